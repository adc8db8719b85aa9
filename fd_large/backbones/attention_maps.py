"""Attention maps of a layer, computed from its queries and keys; fused kernels never store maps.

Every attention module of this project has a method `attention_maps`, which takes the arguments of
the module's `forward` and calls the function `attention_maps` of this file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fd_large.backbones.token_positions import PREFIX, TokenPositions
from fd_large.kernels.window_attention_reference import position_index, region_ids, region_mask


def attention_maps(
    projected: Tensor,
    positions: TokenPositions,
    *,
    num_heads: int,
    scale: Tensor | float,
    cosine: bool,
    table: Tensor | None,
    shift: int = 0,
) -> Tensor:
    """Computes the attention maps of a layer, softmax(scale q k^T + position bias), in each window.

    Args:
        projected: (B, N, 3C), queries, keys and values of each token, with the queries' bias
            already added; prefix tokens come first, then the patches row by row.
        positions: Positions in the image of the tokens of each window.
        num_heads: Number of heads, h.
        scale: Factor of the logits: a number, or (h, 1, 1).
        cosine: Whether queries and keys are normalised to unit length.
        table: Position bias of each offset and head, (R, h), or None.
        shift: Shift of the windows, in tokens.

    Returns: the maps, (B, nW, h, T, T) float32, for nW windows of T tokens.
    """
    q, k, _ = rearrange(
        _in_windows(projected, positions).float(),
        "b w t (three h d) -> three b w h t d",
        three=3,
        h=num_heads,
    )
    if cosine:
        q, k = F.normalize(q, dim=-1, eps=1e-12), F.normalize(k, dim=-1, eps=1e-12)
    logits = (q * scale) @ k.transpose(-2, -1)
    if table is not None:
        prefix = int((positions.index == PREFIX).sum())
        index = position_index(*positions.window, prefix, table.device)
        logits = logits + table.float()[index].permute(2, 0, 1)
    if not bool(positions.whole.all()):
        regions = region_ids(*positions.grid, positions.window, shift, logits.device)
        logits = logits + region_mask(regions, torch.float32)[:, None]
    return logits.softmax(-1)


def with_query_bias(projected: Tensor, bias: Tensor | None) -> Tensor:
    """Adds the queries' bias to projected tokens, and returns them.

    The keys' bias is left out: it adds the same number to all logits of a query, so that the
    attention map does not depend on it.

    Args:
        projected: (B, N, 3C), queries, keys and values of each token.
        bias: (C,), the queries' bias; None adds nothing.
    """
    return projected if bias is None else projected + F.pad(bias, (0, 2 * len(bias)))


def _in_windows(projected: Tensor, positions: TokenPositions) -> Tensor:
    """Gathers the tokens `projected`, (B, N, C), by window into (B, nW, T, C).

    The windows are those of `positions`, nW windows of T tokens. Padding tokens are zeros.
    """
    index = positions.index.to(projected.device)
    if len(index) == 1 and bool(positions.whole[0]):
        return projected[:, None]
    # The last row is the padding's, whose number is -1.
    return F.pad(projected, (0, 0, 0, 1))[:, index]

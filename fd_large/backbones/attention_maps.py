"""Computes a layer's attention maps from queries, keys and bias; fused kernels never store them.

The attention modules of this project have a method `attention_maps` with the arguments of
`forward`, which calls `attention_maps` here.
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
    """Computes the maps of a layer.

    Args:
        projected: (B, N, 3C), the bias of the queries added; tokens in the order of the image,
            prefix tokens first.
        positions: Positions of the windows' tokens.
        num_heads: Number of heads, h.
        scale: Factor of the logits: a number, or (h, 1, 1).
        cosine: Whether queries and keys are normalised.
        table: Position bias by offset, or None.
        shift: Shift of the windows, in tokens.

    Returns: (B, nW, h, T, T) float32.
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
    """Adds the bias of the queries to (B, N, 3C).

    A bias of the keys adds the same to all logits of a query, so that no map depends on it.
    """
    return projected if bias is None else projected + F.pad(bias, (0, 2 * len(bias)))


def _in_windows(projected: Tensor, positions: TokenPositions) -> Tensor:
    """Gathers the tokens (B, N, C) of each window: (B, nW, T, C), padding as 0."""
    index = positions.index.to(projected.device)
    if len(index) == 1 and bool(positions.whole[0]):
        return projected[:, None]
    # The last row is the padding's, whose number is -1.
    return F.pad(projected, (0, 0, 0, 1))[:, index]

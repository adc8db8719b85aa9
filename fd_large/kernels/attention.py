"""The core of attention: logits, position bias, masks, softmax, weighted sum of values.

One function serves SwinV2 windows (cosine), Swin windows and ViT images (dot product). Position
bias comes as a table with an index, masks as region ids, and both are expanded inside, so that
with memory="recompute" no (N, N) map and no gathered bias outlives the forward.

Products run in the dtype of v; normalisation of q and k, scale, bias and softmax in float32
(float64 in a float64 run).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fd_large.errors import ConfigError

Memory = Literal["keep", "recompute"]

# The published penalty between regions of a shifted window: not -inf.
REGION_PENALTY = -100.0
# Region id of padding: no query sees such a key.
PADDING = -1


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: Tensor | float,
    cosine: bool,
    bias_table: Tensor | None = None,
    bias_index: Tensor | None = None,
    regions: Tensor | None = None,
    memory: Memory = "keep",
) -> Tensor:
    """Attention within each of G groups of N tokens (windows, or whole images).

    Args:
        q: (G, h, N, D).
        k: (G, h, N, D).
        v: (G, h, N, D).
        scale: Of the logits: a number, or (h, 1, 1) float32 per head.
        cosine: Logits from the cosine of q and k in place of their product.
        bias_table: (R, h) float32, added to the logits; None: no position bias.
        bias_index: (N, N) int64, row of the table for query and key.
        regions: (nW, N) int64 ids with G a multiple of nW, windows fastest. Queries see keys of
            another id through a penalty of -100, and keys with id -1 not at all.
        memory: "keep" stores the (N, N) maps for backward; "recompute" makes them again.

    Returns: (G, h, N, D), dtype of v.
    Raises: ConfigError: for "keep" on a GPU, where the maps would fill its memory.
    """
    arguments = (q, k, v, scale, cosine, bias_table, bias_index, regions)
    if not torch.is_grad_enabled():
        return attention_reference(*arguments)
    if memory == "recompute":
        # No random numbers inside, so there is no random state to keep.
        return checkpoint(
            attention_reference, *arguments, use_reentrant=False, preserve_rng_state=False
        )
    if q.is_cuda:
        raise ConfigError(
            "student.attention_memory: attention maps must not be kept on a GPU; got 'keep', "
            "expected 'recompute'. Set --student.attention_memory auto."
        )
    return attention_reference(*arguments)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | float,
    cosine: bool,
    bias_table: Tensor | None,
    bias_index: Tensor | None,
    regions: Tensor | None,
) -> Tensor:
    """The plain twin: as `attention`, by autograd alone."""
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    if cosine:
        q, k = F.normalize(q, dim=-1, eps=1e-12), F.normalize(k, dim=-1, eps=1e-12)
    # The scale goes to q, N x D numbers, instead of to the logits, N x N: autograd then keeps one
    # map less.
    logits = ((q * scale).to(v.dtype) @ k.to(v.dtype).transpose(-2, -1)).to(wide)
    if bias_table is not None:
        # An embedding look-up, because its backward is deterministic on GPUs too.
        bias = F.embedding(bias_index, bias_table).permute(2, 0, 1).contiguous()  # (h, N, N)
        logits += bias.to(wide)
    if regions is not None:
        mask = region_mask(regions, wide)  # (nW, N, N)
        by_image = logits.view(-1, mask.shape[0], *logits.shape[1:])  # (B, nW, h, N, N)
        logits = (by_image + mask[:, None]).view_as(logits)
    return logits.softmax(dim=-1).to(v.dtype) @ v


def region_mask(regions: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what is added to the logits of queries (rows) and keys (columns): (nW, N, N)."""
    queries, keys = regions[:, :, None], regions[:, None, :]
    mask = (queries != keys).to(dtype) * REGION_PENALTY
    return mask.masked_fill_(keys == PADDING, -torch.inf)

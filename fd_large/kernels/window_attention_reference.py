"""Attention of `window_attention.py` in plain torch: rolls the map, copies windows, as published.

Source: Liu et al., arXiv 2103.14030 and 2111.09883.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# What the plain version does with its (N, N) maps until backward; the kernels have none.
# "sequential" computes them again, as "recompute" does, for a few windows at a time.
Memory = Literal["keep", "recompute", "sequential"]

# The published penalty between regions of a shifted window: not -inf.
REGION_PENALTY = -100.0
# Region id of padding: no query sees such a key.
PADDING = -1
# Elements of the maps that "sequential" computes at once: 256 MiB of float32.
_SEQUENTIAL_ELEMENTS = 2**26


class Layout(NamedTuple):
    """Heads, and windows of a map whose tokens attend to one another.

    Attributes:
        num_heads: h.
        height: Rows of the map.
        width: Columns of the map.
        window: Rows and columns of a window.
        shift: Offset of the windows in both directions, in tokens.
        cosine: Whether logits are cosines of q and k instead of dot products.
    """

    num_heads: int
    height: int
    width: int
    window: tuple[int, int]
    shift: int
    cosine: bool


def reference(
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    scale: Tensor | float,
    layout: Layout,
    memory: Memory = "keep",
) -> Tensor:
    """Computes attention in plain torch; autograd computes the backward.

    Args:
        qkv: (B, N, 3C), prefix tokens, if any, and then the tokens of the map by rows. With prefix
            tokens there is one window, as large as the map.
        bias: (2, C), the biases of queries and of values; None for 0.
        table: (R, h), the position bias of each offset between query and key; None for 0.
        scale: Factor of the logits, a number or (h,).
        layout: Heads and windows.
        memory: What is done with the (N, N) attention maps until backward: "keep" stores them,
            "recompute" computes them again, and "sequential" computes them again for a few windows
            at a time.

    Returns: (B, N, C).
    """
    num_heads, height, width, window, shift, cosine = layout
    if bias is not None:
        bias = torch.cat([bias[0], torch.zeros_like(bias[0]), bias[1]])
        qkv = (qkv + bias).to(qkv.dtype)
    index = regions = None
    if table is not None:
        index = position_index(*window, qkv.shape[1] - height * width, qkv.device)
    if isinstance(scale, Tensor):
        scale = scale.view(-1, 1, 1)
    split = {"three": 3, "h": num_heads}
    if window == (height, width) and not shift:
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", **split)
        out = _groups(q, k, v, scale, cosine, table, index, regions, 1, memory)
        return rearrange(out, "b h n d -> b n (h d)")
    x = qkv.unflatten(1, (height, width))
    bottom, right = -height % window[0], -width % window[1]
    if bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    if shift:
        x = x.roll((-shift, -shift), dims=(1, 2))
    if shift or bottom or right:
        regions = region_ids(height, width, window, shift, qkv.device)
    rows, columns = x.shape[1] // window[0], x.shape[2] // window[1]
    sides = {"i": window[0], "j": window[1]}
    q, k, v = rearrange(x, "b (y i) (x j) (three h d) -> three (b y x) h (i j) d", **sides, **split)
    out = _groups(q, k, v, scale, cosine, table, index, regions, rows * columns, memory)
    out = rearrange(out, "(b y x) h (i j) d -> b (y i) (x j) (h d)", y=rows, x=columns, **sides)
    if shift:
        out = out.roll((shift, shift), dims=(1, 2))
    return out[:, :height, :width].flatten(1, 2)


def _groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | float,
    cosine: bool,
    table: Tensor | None,
    index: Tensor | None,
    regions: Tensor | None,
    windows: int,
    memory: Memory,
) -> Tensor:
    """Computes attention among the N tokens of each of the B * nW windows.

    Args:
        q: (B * nW, h, N, D), queries.
        k: (B * nW, h, N, D), keys.
        v: (B * nW, h, N, D), values.
        scale: Factor of the logits.
        cosine: Whether logits are cosines of q and k instead of dot products.
        table: (R, h), the position bias of each offset; None for no bias.
        index: (N, N), the row of `table` for each (query, key) pair; None without `table`.
        regions: (nW, N), the region of each token (`region_ids`). Tokens attend to tokens of the
            same region only. None if all tokens of a window attend to one another.
        windows: nW, the number of windows of an image.
        memory: What is done with the (N, N) attention maps until backward: "keep" stores them,
            "recompute" computes them again, and "sequential" computes them again for a few windows
            at a time.

    Returns: (B * nW, h, N, D).
    """
    if memory == "keep":
        return _group_attention(q, k, v, scale, cosine, table, index, regions)
    size = windows
    if memory == "sequential":
        elements = len(q) // windows * q.shape[1] * q.shape[2] ** 2
        size = max(1, min(windows, _SEQUENTIAL_ELEMENTS // elements))
    pieces = []
    for start in range(0, windows, size):
        some = slice(start, start + size)
        q_, k_, v_ = (t.unflatten(0, (-1, windows))[:, some].flatten(0, 1) for t in (q, k, v))
        there = None if regions is None else regions[some]
        arguments = (q_, k_, v_, scale, cosine, table, index, there)
        if torch.is_grad_enabled():
            # No random numbers inside, so there is no random state to keep.
            piece = checkpoint(
                _group_attention, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            piece = _group_attention(*arguments)
        pieces.append(piece.unflatten(0, (len(q) // windows, -1)))
    return torch.cat(pieces, dim=1).flatten(0, 1) if len(pieces) > 1 else pieces[0].flatten(0, 1)


def _group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | float,
    cosine: bool,
    table: Tensor | None,
    index: Tensor | None,
    regions: Tensor | None,
) -> Tensor:
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    if cosine:
        q, k = F.normalize(q, dim=-1, eps=1e-12), F.normalize(k, dim=-1, eps=1e-12)
    # The scale is applied to q (N x D) instead of to the logits (N x N), so that autograd stores
    # one map less.
    logits = ((q * scale).to(v.dtype) @ k.to(v.dtype).transpose(-2, -1)).to(wide)
    if table is not None:
        # An embedding lookup, because its backward is deterministic on GPUs too.
        bias = F.embedding(index, table).permute(2, 0, 1).contiguous()  # (h, N, N)
        logits += bias.to(wide)
    if regions is not None:
        mask = region_mask(regions, wide)  # (nW, N, N)
        by_image = logits.view(-1, mask.shape[0], *logits.shape[1:])  # (B, nW, h, N, N)
        logits = (by_image + mask[:, None]).view_as(logits)
    return logits.softmax(dim=-1).to(v.dtype) @ v


def region_mask(regions: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the mask that is added to the logits, (nW, N, N) with queries before keys.

    The mask is -inf for keys that are padding, -100 between tokens of different regions, else 0.

    Args:
        regions: (nW, N), the region of each token of each window (`region_ids`).
        dtype: Data type of the mask.
    """
    queries, keys = regions[:, :, None], regions[:, None, :]
    mask = (queries != keys).to(dtype) * REGION_PENALTY
    return mask.masked_fill_(keys == PADDING, -torch.inf)


@torch.compiler.assume_constant_result
def region_ids(
    height: int, width: int, window: tuple[int, int], shift: int, device: torch.device
) -> Tensor:
    """Returns the region id of each token of each (shifted) window: (nW, N) int64.

    After the roll, the last windows hold parts from opposite edges of the map; tokens from
    different parts have different ids. Padding has the id -1.

    Args:
        height: Rows of the map before padding.
        width: Columns of the map before padding.
        window: Rows and columns of a window.
        shift: Offset of the windows, in tokens. With 0, the ids mark only padding.
        device: Device of the result.
    """
    return _region_ids(height, width, window, shift, device)


@lru_cache(maxsize=256)
def _region_ids(
    height: int, width: int, window: tuple[int, int], shift: int, device: torch.device
) -> Tensor:
    rows, row_is_padding = _axis_regions(height, window[0], shift)
    columns, column_is_padding = _axis_regions(width, window[1], shift)
    ids = rows[:, None] * 3 + columns[None, :]
    ids[row_is_padding[:, None] | column_is_padding[None, :]] = PADDING
    ids = rearrange(ids, "(h i) (w j) -> (h w) (i j)", i=window[0], j=window[1])
    return _tensor(ids, device)


def _axis_regions(length: int, window: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    padded = math.ceil(length / window) * window
    position = np.arange(padded)  # These are places of the rolled map.
    region = np.zeros(padded, dtype=np.int64)
    if shift:
        region += position >= padded - window
        region += position >= padded - shift
    return region, (position + shift) % padded >= length


@torch.compiler.assume_constant_result
def position_index(rows: int, columns: int, prefix: int, device: torch.device) -> Tensor:
    """Returns the row of the table for every (query, key) pair of a grid: (N, N) int64.

    For patches, the row is (dy + rows - 1)(2 columns - 1) + dx + columns - 1, with (dy, dx) = query
    - key. Prefix tokens come before the patches. The last three rows of the table are, as for
    BEiT's CLS, for the pairs (prefix, patch), (patch, prefix) and (prefix, prefix).

    Args:
        rows: Rows of the grid of patches.
        columns: Columns of the grid of patches.
        prefix: Number of prefix tokens, such as a class token; N is this number plus
            rows * columns.
        device: Device of the result.
    """
    return _position_index(rows, columns, prefix, device)


@lru_cache(maxsize=64)
def _position_index(rows: int, columns: int, prefix: int, device: torch.device) -> Tensor:
    y, x = (axis.reshape(-1) for axis in np.mgrid[:rows, :columns])
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    index = (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1
    if prefix:
        n = (2 * rows - 1) * (2 * columns - 1)
        patches, index = index, np.empty((rows * columns + prefix,) * 2, dtype=np.int64)
        index[prefix:, prefix:] = patches
        index[:prefix, :], index[:, :prefix], index[:prefix, :prefix] = n, n + 1, n + 2
    return _tensor(index, device)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    # Not an inference tensor, which autograd refuses to save, even if a teacher's forward under
    # inference_mode is the first to ask.
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)

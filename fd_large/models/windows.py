"""Windows over a map: their size, their tables of relative positions, and who may see whom.

Tables are functions of (window, pretrained window, device), cached, and made outside the factories
that `deepspeed.zero.Init` patches, so that no bf16 engine rounds a coordinate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fd_large.kernels.attention import PADDING


def fit_window(height: int, width: int, window: int) -> int:
    """Returns the window that a map gets: the wanted one, or the map's shorter side if smaller."""
    return min(window, height, width)


def window_shift(height: int, width: int, window: int, block: int) -> int:
    """Returns by how much a block's windows are shifted: half a window in odd blocks.

    A map no larger than its window on either axis is not shifted.
    """
    return window // 2 if block % 2 == 1 and min(height, width) > window else 0


def in_windows(
    x: Tensor, window: int, shift: int, attend: Callable[[Tensor, Tensor | None], Tensor]
) -> Tensor:
    """Applies attention within the windows of a map and puts the result back in place.

    A map that its window does not divide is padded right and bottom with zeros that no query sees.

    Args:
        x: (B, H, W, C).
        window: Side w of a window in tokens.
        shift: By how much windows start off the map's corner, in tokens.
        attend: (B * nW, w * w, C), regions (nW, w * w) or None -> (B * nW, w * w, C).

    Returns: (B, H, W, C).
    """
    height, width = x.shape[1:3]
    bottom, right = -height % window, -width % window
    if bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    if shift:
        x = x.roll((-shift, -shift), dims=(1, 2))
    rows, columns = x.shape[1] // window, x.shape[2] // window
    groups = rearrange(x, "b (h i) (w j) c -> (b h w) (i j) c", i=window, j=window)
    regions = None
    if shift or bottom or right:
        regions = region_ids(height, width, window, shift, x.device)
    groups = attend(groups, regions)
    x = rearrange(
        groups, "(b h w) (i j) c -> b (h i) (w j) c", h=rows, w=columns, i=window, j=window
    )
    if shift:
        x = x.roll((shift, shift), dims=(1, 2))
    return x[:, :height, :width] if bottom or right else x


@lru_cache(maxsize=256)
def region_ids(height: int, width: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Returns ids of what belongs together in each (shifted) window: (nW, w * w) int64.

    After the roll, windows at the end hold pieces from opposite edges of the map: tokens with
    different ids were not neighbours. Padding has the id -1.

    Args:
        height: Rows of the map before padding.
        width: Columns of the map before padding.
        window: Side w in tokens.
        shift: In tokens; 0: ids tell padding only.
        device: Of the result.
    """
    rows, row_is_padding = _axis_regions(height, window, shift)
    columns, column_is_padding = _axis_regions(width, window, shift)
    ids = rows[:, None] * 3 + columns[None, :]
    ids[row_is_padding[:, None] | column_is_padding[None, :]] = PADDING
    ids = rearrange(ids, "(h i) (w j) -> (h w) (i j)", i=window, j=window)
    return _tensor(ids, device)


def _axis_regions(length: int, window: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    padded = math.ceil(length / window) * window
    position = np.arange(padded)  # In the rolled map.
    region = np.zeros(padded, dtype=np.int64)
    if shift:
        region += position >= padded - window
        region += position >= padded - shift
    return region, (position + shift) % padded >= length


@lru_cache(maxsize=64)
def position_index(window: int, device: torch.device) -> Tensor:
    """Returns the table row of every (query, key) pair: (w * w, w * w) int64.

    Row (dy + w - 1)(2w - 1) + dx + w - 1, with (dy, dx) = query - key.
    """
    return _tensor(grid_index(window, window), device)


def grid_index(height: int, width: int) -> np.ndarray:
    """Returns the table row of every (query, key) pair of a grid: (H * W, H * W) int64."""
    y, x = (axis.reshape(-1) for axis in np.mgrid[:height, :width])
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    return (dy + height - 1) * (2 * width - 1) + dx + width - 1


@lru_cache(maxsize=64)
def coordinate_table(window: int, pretrained_window: int, device: torch.device) -> Tensor:
    """Returns SwinV2's log-spaced relative coordinates: ((2w - 1)^2, 2) float32.

    t = 8 d / (w0 - 1), then sign(t) log2(|t| + 1) / log2(8), where w0 is the window of
    pre-training. A window of one token has the single offset 0, which the published code divides
    by 0; here it stays 0.

    Args:
        window: w, side in tokens.
        pretrained_window: w0; 0: the window itself.
        device: Of the result.
    """
    reference = max((pretrained_window or window) - 1, 1)
    with torch.inference_mode(False):
        offsets = torch.from_numpy(np.arange(1 - window, window, dtype=np.float32))
        scaled = offsets / reference * 8
        log = scaled.sign() * torch.log2(scaled.abs() + 1.0) / math.log2(8)
        n = len(log)
        table = torch.stack([log[:, None].expand(n, n), log[None, :].expand(n, n)], dim=-1)
        return table.reshape(-1, 2).to(device)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    # Not an inference tensor, which autograd refuses to save, even where a teacher's forward under
    # inference_mode is the first to ask.
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)

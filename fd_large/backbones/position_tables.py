"""Resizes position embeddings and relative position tables to grids other than the trained one.

Absolute positions are resized bicubically. A table of relative positions lacks the offsets of a
larger grid. The entries for these offsets are interpolated by a spline on a geometric progression,
as BEiT and Feature-Distillation do when they fine-tune.

`fit_positions` and `fit_offsets` run in the forwards of a ViT on other grids and are
differentiable. For a smaller grid `fit_offsets` takes the inner part of the table, whose offsets
have the same meaning, so that one table learns from images of all sizes. `resize_positions` and
`resize_table` change a file's weights once. SwinV2 needs none of these functions: its bias is an
MLP on coordinates, which are scaled by the window of pre-training.

Sources: Bao et al., arXiv 2106.08254, and the code of Feature-Distillation (table resize); Caron et
al., arXiv 2104.14294 (DINO's scale).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fd_large.errors import WeightsError

Grid = tuple[int, int]


def fit_positions(
    embedding: Tensor, old: Grid, new: Grid, *, margin: float = 0.0, antialias: bool = False
) -> Tensor:
    """Resizes the absolute positions of patches to another grid, bicubically.

    Corners are not aligned.

    Args:
        embedding: (1, prefix + H W, C), positions on the old grid; rows of prefix tokens come
            first.
        old: (H, W), the old grid.
        new: (H', W'), the new grid.
        margin: Number added to the sides of the new grid when the scale factors are computed
            (DINO's 0.1).
        antialias: Whether the filter is widened for a smaller grid (DINOv2 with registers).

    Returns: the positions of patches alone, (1, H', W', C), in float32 or wider.
    """
    patches = embedding[:, embedding.shape[1] - old[0] * old[1] :]
    wide = patches.to(torch.promote_types(patches.dtype, torch.float32))
    grid = rearrange(wide, "one (h w) c -> one c h w", h=old[0])
    if old != new and margin:
        scale = tuple((after + margin) / before for before, after in zip(old, new, strict=True))
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic")
        assert grid.shape[-2:] == new, grid.shape
    elif old != new:
        grid = F.interpolate(grid, size=new, mode="bicubic", antialias=antialias)
    return grid.permute(0, 2, 3, 1)


def fit_offsets(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Resizes a relative position table to another grid; differentiable in the table.

    Args:
        table: ((2H - 1)(2W - 1), heads) float32 of the old grid, without rows of prefix tokens.
        old: (H, W), the old grid.
        new: (H', W'), the new grid.

    Returns: the new table, ((2H' - 1)(2W' - 1), heads).
    """
    if old == new:
        return table
    down, across = (
        _matrix(before, after, table.device, table.dtype)
        for before, after in zip(old, new, strict=True)
    )
    offsets = rearrange(table, "(y x) heads -> heads y x", y=2 * old[0] - 1)
    return rearrange(down @ offsets @ across.T, "heads y x -> (y x) heads")


@lru_cache(maxsize=64)
def _matrix(old: int, new: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns the matrix that resizes a relative position table along one axis.

    Args:
        old: Number of tokens along the axis of the table.
        new: Number of tokens along the axis of the result.
        device: Device of the matrix.
        dtype: Dtype of the matrix.

    Returns: (2new - 1, 2old - 1).
    """
    before, after = 2 * old - 1, 2 * new - 1
    matrix = np.eye(before)[old - new : old + new - 1] if new <= old else _stretched(before, after)
    with torch.inference_mode(False):
        return torch.from_numpy(matrix.copy()).to(device, dtype)


def resize_positions(
    positions: Tensor,
    prefix: int,
    side: int,
    *,
    margin: float = 0.0,
    antialias: bool = False,
    where: str = "weights",
) -> Tensor:
    """Resizes a file's position embedding to another square grid.

    Args:
        positions: (1, prefix + n * n, C), with rows of prefix tokens first.
        prefix: Number of class and distillation tokens, whose rows stay unchanged.
        side: Side of the new grid, in patches.
        margin: Number added to the sides of the new grid when the scale factors are computed
            (DINO's 0.1).
        antialias: Whether the filter is widened for a smaller grid (DINOv2 with registers).
        where: Field that the user set, for the message.

    Returns: (1, prefix + side * side, C), in float32 or wider.
    Raises: WeightsError: if the grid of the file is not square.
    """
    old = square_side(positions.shape[1] - prefix, where=where)
    grid = fit_positions(
        positions, (old, old), (side, side), margin=margin, antialias=antialias
    ).flatten(1, 2)
    return torch.cat([positions[:, :prefix].to(grid.dtype), grid], dim=1)


def resize_table(table: Tensor, rows: int, extra: int, *, where: str = "weights") -> Tensor:
    """Resizes a file's table of relative positions to another square grid.

    The old offsets are spread over the range of the new offsets by a geometric progression, so that
    near offsets hardly change and far offsets stretch. A cubic spline through the old entries gives
    the new entries.

    Args:
        table: ((2n - 1)^2 + extra, heads), with the extra rows last.
        rows: Number of rows of the result, including the extra rows.
        extra: Number of rows for class tokens, which stay unchanged.
        where: Field that the user set, for the message.

    Returns: (rows, heads), in float32 or wider.
    Raises: WeightsError: if the old or the new number of offsets is not a square.
    """
    old = square_side(table.shape[0] - extra, where=where)
    new = square_side(rows - extra, where=where)
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    along = torch.from_numpy(_stretched(old, new))
    offsets = rearrange(wide[: len(wide) - extra].double(), "(y x) heads -> heads y x", y=old)
    resized = rearrange(along @ offsets @ along.T, "heads y x -> (y x) heads").to(wide.dtype)
    return torch.cat([resized, wide[len(wide) - extra :]])


def square_side(cells: int, *, where: str = "weights") -> int:
    """Returns the side of a square grid with `cells` cells.

    Raises: WeightsError: if the number is not a square; the message begins with `where`.
    """
    side = math.isqrt(max(cells, 0))
    if side < 1 or side * side != cells:
        raise WeightsError(
            f"{where}: positions are not on a square grid; got {cells} positions, expected a "
            "square number. Only square grids are resized: set --teacher.architecture.image_size "
            "to the image size of the file."
        )
    return side


@lru_cache(maxsize=16)
def _stretched(old: int, new: int) -> np.ndarray:
    """Returns the matrix (new, old) float64 that stretches values at old offsets to new offsets.

    A spline through the values at the stretched old offsets gives the values at the new offsets.

    Args:
        old: Odd number of old offsets.
        new: Odd number of new offsets.
    """
    at = progression(old, new)
    offsets = np.arange(new, dtype=np.float64) - new // 2
    # Beyond the outermost old offset its value holds.
    return spline_matrix(at, np.clip(offsets, at[0], at[-1]))


def progression(old: int, new: int) -> np.ndarray:
    """Returns the positions of the old offsets on the axis of the new offsets, (old,) float64.

    Offset k lies at 1 + q + ... + q^(k-1), with q such that the outermost old offset reaches the
    outermost new offset. As published, bisection between 1.01 and 1.5 finds q to a millionth.

    Args:
        old: Odd number of old offsets, 2n - 1.
        new: Odd number of new offsets.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q ** (old // 2)) / (1 - q) > new // 2:
            high = q
        else:
            low = q
    half = np.cumsum([q**k for k in range(old // 2)]) if old > 1 else np.empty(0)
    return np.concatenate([-half[::-1], [0.0], half])


def spline_matrix(knots: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Returns the matrix (points, knots) float64 of a cubic spline.

    The matrix maps values at the knots to the spline's values at the points. The ends are "not a
    knot": the first two pieces are one cubic, and so are the last two. With up to four knots the
    spline is a single polynomial.

    Args:
        knots: Positions of the knots, in rising order.
        points: Positions at which the spline is evaluated, within the range of the knots.
    """
    n = len(knots)
    if n < 5:
        vandermonde = np.vander(knots, n)
        return np.vander(points, n) @ np.linalg.inv(vandermonde)
    h = np.diff(knots)
    # Second derivatives at the knots from values: left @ second = right @ values.
    left, right = np.zeros((n, n)), np.zeros((n, n))
    for i in range(1, n - 1):
        left[i, i - 1 : i + 2] = h[i - 1], 2 * (h[i - 1] + h[i]), h[i]
        right[i, i - 1 : i + 2] = 6 / h[i - 1], -6 / h[i - 1] - 6 / h[i], 6 / h[i]
    left[0, :3] = h[1], -h[0] - h[1], h[0]
    left[-1, -3:] = h[-1], -h[-2] - h[-1], h[-2]
    second = np.linalg.solve(left, right)
    piece = np.clip(np.searchsorted(knots, points, side="right") - 1, 0, n - 2)
    a, b = (knots[piece + 1] - points)[:, None], (points - knots[piece])[:, None]
    width, values = h[piece][:, None], np.eye(n)
    return (
        (second[piece] * a**3 + second[piece + 1] * b**3) / (6 * width)
        + (values[piece] / width - second[piece] * width / 6) * a
        + (values[piece + 1] / width - second[piece + 1] * width / 6) * b
    )

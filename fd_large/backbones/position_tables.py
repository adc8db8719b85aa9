"""Positions of a ViT on other grids than the one that they were learned on, made in every forward.

Absolute positions are resized bicubically. FD's ViTs own one table of relative positions for all
blocks. A larger grid needs offsets that the table lacks: they are made from it by the spline on a
geometric progression with which BEiT and Feature-Distillation resize such tables when they
fine-tune. A smaller grid takes the inner part, whose offsets mean the same. So one table learns
from images of all sizes, and from windows of a large image as from the whole of it.

Source: Bao et al., arXiv 2106.08254, and the code of Feature-Distillation (table resize).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

Grid = tuple[int, int]


def fit_positions(embedding: Tensor, old: Grid, new: Grid) -> Tensor:
    """Makes absolute positions of patches for another grid, bicubic; differentiable.

    Args:
        embedding: (1, prefix + H W, C) of the old grid; rows of prefix tokens come first.
        old: (H, W).
        new: (H', W').

    Returns: (1, H', W', C), float32 at least, without the prefix.
    """
    patches = embedding[:, embedding.shape[1] - old[0] * old[1] :]
    wide = patches.to(torch.promote_types(patches.dtype, torch.float32))
    grid = rearrange(wide, "one (h w) c -> one c h w", h=old[0])
    if old != new:
        grid = F.interpolate(grid, size=new, mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1)


def fit_offsets(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Makes a table of offsets for another grid; differentiable in the table.

    Args:
        table: ((2H - 1)(2W - 1), heads) float32 of the old grid, without rows of prefix tokens.
        old: (H, W).
        new: (H', W').

    Returns: ((2H' - 1)(2W' - 1), heads).
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
    """Returns the matrix from offsets along `old` tokens to `new` ones: (2new - 1, 2old - 1)."""
    before, after = 2 * old - 1, 2 * new - 1
    if new <= old:
        matrix = np.eye(before)[old - new : old + new - 1]
    else:
        knots = progression(before, after)
        wanted = np.clip(np.arange(after) - (new - 1.0), knots[0], knots[-1])
        matrix = spline_matrix(knots, wanted)
    with torch.inference_mode(False):
        return torch.from_numpy(matrix.copy()).to(device, dtype)


def progression(old: int, new: int) -> np.ndarray:
    """Returns where the old offsets lie on the axis of the new ones: (old,) float64.

    Offset k lies at 1 + q + ... + q^(k-1), with q such that the outermost reaches the new
    outermost; q is sought by bisection between 1.01 and 1.5 to a millionth, as published.

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
    """The cubic spline through values at knots, as a matrix: (points, knots) float64.

    The ends are "not a knot": the first two pieces are one cubic, and the last two. Up to four
    values make a single polynomial.

    Args:
        knots: Rising.
        points: Within the knots.
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

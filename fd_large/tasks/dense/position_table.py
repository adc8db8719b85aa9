"""A ViT's table of relative positions on other grids than the one it was learned on.

FD's ViTs own one table for all blocks. Inside a window as large as the grid of the distillation the
table serves as it is. A block that sees the whole image needs offsets that the table lacks. They
are made from it in every forward, by the spline on a geometric progression with which BEiT and
Feature-Distillation resize such tables when they fine-tune, and the one table learns from both
kinds of blocks. A smaller grid takes the inner part, whose offsets mean the same.

Source: Bao et al., arXiv 2106.08254, and the code of Feature-Distillation (table resize).
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from fd_large.weights.resize import progression, spline_matrix


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

"""Position tables for another grid or window than the file's.

Position embeddings are resized bicubically; tables of relative positions on a geometric
progression, as BEiT and Feature-Distillation do when they fine-tune. SwinV2 needs neither: its bias
is an MLP on coordinates, which are scaled by the window of pre-training.

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

from fd_large.backbones.position_tables import progression, spline_matrix
from fd_large.errors import WeightsError


def resize_positions(
    positions: Tensor,
    prefix: int,
    side: int,
    *,
    margin: float = 0.0,
    antialias: bool = False,
    where: str = "weights",
) -> Tensor:
    """Resizes a position embedding to another square grid, bicubic with corners not aligned.

    Args:
        positions: (1, prefix + n * n, C).
        prefix: Number of class and distillation tokens, whose rows stay as they are.
        side: Side of the new grid.
        margin: Number added to the new side in the scale alone (DINO's 0.1).
        antialias: Whether the filter is widened for a smaller grid (DINOv2 with registers).
        where: What the user set, for the message.

    Returns: (1, prefix + side * side, C), float32 at least.
    Raises: WeightsError: if the grid of the file is no square.
    """
    wide = positions.to(torch.promote_types(positions.dtype, torch.float32))
    old = square_side(positions.shape[1] - prefix, where=where)
    grid = rearrange(wide[:, prefix:], "one (h w) c -> one c h w", h=old)
    if margin:
        scale = (side + margin) / old
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    else:
        grid = F.interpolate(
            grid, size=(side, side), mode="bicubic", align_corners=False, antialias=antialias
        )
    assert grid.shape[-2:] == (side, side), grid.shape
    return torch.cat([wide[:, :prefix], rearrange(grid, "one c h w -> one (h w) c")], dim=1)


def resize_table(table: Tensor, rows: int, extra: int, *, where: str = "weights") -> Tensor:
    """Resizes a table of relative positions to another square grid.

    The old offsets are spread over the range of the new ones by a geometric progression, so that
    near offsets stay nearly as they are and far ones stretch; a cubic spline through them gives
    the new entries.

    Args:
        table: ((2n - 1)^2 + extra, heads).
        rows: Number of rows wanted, extra ones included.
        extra: Number of rows at the end for class tokens, which stay as they are.
        where: What the user set, for the message.

    Returns: (rows, heads), float32 at least.
    Raises: WeightsError: if the offsets of the file form no square.
    """
    old = square_side(table.shape[0] - extra, where=where)
    new = square_side(rows - extra, where=where)
    wide = table.to(torch.promote_types(table.dtype, torch.float32))
    along = torch.from_numpy(_spline_matrix(old, new))
    offsets = rearrange(wide[: len(wide) - extra].double(), "(y x) heads -> heads y x", y=old)
    resized = rearrange(along @ offsets @ along.T, "heads y x -> (y x) heads").to(wide.dtype)
    return torch.cat([resized, wide[len(wide) - extra :]])


def square_side(cells: int, *, where: str = "weights") -> int:
    """Returns the side of a square of so many cells.

    Raises: WeightsError: if it is none.
    """
    side = math.isqrt(max(cells, 0))
    if side < 1 or side * side != cells:
        raise WeightsError(
            f"{where}: positions of no square grid; got {cells} of them, expected a square number. "
            "Only square grids are resized: set --teacher.architecture.image_size as in the file."
        )
    return side


@lru_cache(maxsize=16)
def _spline_matrix(old: int, new: int) -> np.ndarray:
    """What a spline through the old offsets makes of the new: (new, old) float64."""
    at = progression(old, new)
    wanted = np.arange(new, dtype=np.float64) - new // 2
    # Beyond the outermost old offset its value holds.
    return spline_matrix(at, np.clip(wanted, at[0], at[-1]))

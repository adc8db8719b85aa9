"""Where the tokens of an attention map lie in the image: whole images and (shifted) windows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# In place of a token's number in the grid.
PREFIX, PADDING = -2, -1


class Places(NamedTuple):
    """The geometry of one layer's maps.

    Attributes:
        index: (nW, T) int64, each token's number in the grid, row by row; PREFIX for CLS and the
            like, PADDING for what lies outside of the image.
        grid: Rows and columns of the layer's tokens.
        window: Rows and columns of a window; the grid itself for whole images.
        whole: (nW,) bool, windows without padding that were not put together from opposite edges.
    """

    index: Tensor
    grid: tuple[int, int]
    window: tuple[int, int]
    whole: Tensor

    def to(self, device: torch.device) -> Places:
        """The same on a device."""
        return self._replace(index=self.index.to(device), whole=self.whole.to(device))


def image_places(grid: tuple[int, int], num_prefix_tokens: int) -> Places:
    """All tokens of an image, prefix tokens first."""
    prefix = torch.full((num_prefix_tokens,), PREFIX)
    index = torch.cat([prefix, torch.arange(grid[0] * grid[1])])
    return Places(index[None], grid, grid, torch.ones(1, dtype=torch.bool))


def window_places(
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    *,
    pad_first: bool,
) -> Places:
    """Windows, row by row, after a roll by -shift.

    Args:
        grid: Rows and columns of tokens.
        window: Rows and columns of a window.
        shift: In tokens, down and right.
        pad_first: Whether the map is padded before the roll (SwinV2 here) or after it (timm).
    """
    numbers = torch.arange(grid[0] * grid[1]).view(grid)
    padding = (0, -grid[1] % window[1], 0, -grid[0] % window[0])
    if pad_first:
        numbers = F.pad(numbers, padding, value=PADDING)
    numbers = numbers.roll((-shift[0], -shift[1]), dims=(0, 1))
    if not pad_first:
        numbers = F.pad(numbers, padding, value=PADDING)
    index = rearrange(numbers, "(y i) (x j) -> (y x) (i j)", i=window[0], j=window[1])
    rows, columns = index // grid[1], index % grid[1]
    together = (index != PADDING).all(1)
    for axis in (rows, columns):
        spread = axis.max(1).values - axis.min(1).values
        together &= spread < window[0 if axis is rows else 1]
    return Places(index, grid, window, together)

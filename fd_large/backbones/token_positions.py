"""The positions in the image of an attention map's tokens, for whole images and for windows."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fd_large.backbones.windows import Windows

# Values of `TokenPositions.index` for tokens that have no number in the grid.
PREFIX, PADDING = -2, -1


class TokenPositions(NamedTuple):
    """The positions in the image of the tokens of one layer's attention maps.

    Attributes:
        index: (nW, T) int64, for each of nW windows of T tokens the number of each token in the
            grid, counted row by row from 0; PREFIX for prefix tokens, PADDING for tokens outside
            the image.
        grid: Rows and columns of the layer's tokens.
        window: Rows and columns of a window; equal to `grid` if there are no windows.
        whole: (nW,) bool, True for a window without padding whose tokens are adjacent in the image
            (not joined from opposite edges by the shift).
    """

    index: Tensor
    grid: tuple[int, int]
    window: tuple[int, int]
    whole: Tensor

    def to(self, device: torch.device) -> TokenPositions:
        """Returns the same positions with tensors on another device."""
        return self._replace(index=self.index.to(device), whole=self.whole.to(device))


def image_positions(grid: tuple[int, int], num_prefix_tokens: int) -> TokenPositions:
    """Returns the positions of all tokens of an image, without windows.

    Args:
        grid: Rows and columns of the patches.
        num_prefix_tokens: Number of tokens before the patches.
    """
    prefix = torch.full((num_prefix_tokens,), PREFIX)
    index = torch.cat([prefix, torch.arange(grid[0] * grid[1])])
    return TokenPositions(index[None], grid, grid, torch.ones(1, dtype=torch.bool))


def positions_in(x: Tensor, windows: Windows) -> TokenPositions:
    """Returns the positions of the tokens of the map `x`, (B, H, W, C), cut into `windows`."""
    side, shift = (windows.side,) * 2, (windows.shift,) * 2
    return window_positions((x.shape[1], x.shape[2]), side, shift, pad_first=True)


def window_positions(
    grid: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    *,
    pad_first: bool,
) -> TokenPositions:
    """Returns the positions of a grid's tokens after a roll by -shift and a cut into windows.

    Windows are numbered row by row, and so are the tokens in a window.

    Args:
        grid: Rows and columns of tokens.
        window: Rows and columns of a window.
        shift: Shift of the windows in tokens, down and right.
        pad_first: True if the map is padded before the roll, as in this package's SwinV2; False if
            the map is padded after the roll, as in timm.
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
    for axis, side in ((rows, window[0]), (columns, window[1])):
        together &= axis[:, -1] - axis[:, 0] == side - 1
    return TokenPositions(index, grid, window, together)

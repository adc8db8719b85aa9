"""Resizes, crops and flips an image together with its masks, points and classes or depths.

Pixels stay uint8. The caller draws all random numbers, so that a view is a function of (seed,
epoch, position).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Number = TypeVar("Number", bound=np.number[Any])


@dataclass(frozen=True)
class View:
    """A view of an image, which is resized, then cropped, and then perhaps flipped.

    Attributes:
        original: Height and width of the image, in pixels.
        resized: Height and width after resizing.
        crop: Top, left, height and width of the crop in the resized image.
        flipped: Whether the crop is mirrored horizontally.
    """

    original: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int, int, int]
    flipped: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the view, in pixels."""
        return self.crop[2:]

    def image(self, image: Tensor) -> Tensor:
        """Returns the view of an image, resized bilinearly with antialiasing.

        Args:
            image: (3, H, W) uint8.

        Returns: (3, h, w) uint8, where (h, w) is `size`.
        """
        if self.resized != self.original:
            image = F.interpolate(image[None], self.resized, mode="bilinear", antialias=True)[0]
        return self._cut(image)

    def mask(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Returns the view of a mask.

        If the mask is resized, a pixel is 1 if ones cover at least half of it.

        Args:
            mask: (H, W) uint8, 0 or 1.

        Returns: (h, w) uint8, 0 or 1, where (h, w) is `size`.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(mask))
        if self.resized != self.original:
            covered = F.interpolate(
                pixels[None, None].float(), self.resized, mode="bilinear", antialias=True
            )
            pixels = (covered[0, 0] >= 0.5).to(torch.uint8)
        return self._cut(pixels).numpy()

    def numbers(self, numbers: NDArray[Number]) -> NDArray[Number]:
        """Returns the view of an array with a class or a depth for each pixel.

        The array is resized by nearest neighbour.

        Args:
            numbers: (H, W).

        Returns: (h, w), where (h, w) is `size`.
        """
        top, left, rows, columns = self.crop
        (height, width), (new_height, new_width) = self.original, self.resized
        down = (top + np.arange(rows)) * height // new_height
        across = (left + np.arange(columns)) * width // new_width
        return numbers[down[:, None], across[:: -1 if self.flipped else 1]]

    def points(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Maps points from pixels of the image to pixels of the view.

        A point may be outside the view.

        Args:
            points: (n, 2), x and y in pixels of the image.

        Returns: (n, 2), x and y in pixels of the view.
        """
        (height, width), (new_height, new_width) = self.original, self.resized
        top, left, _, crop_width = self.crop
        moved = points * (new_width / width, new_height / height) - (left, top)
        if self.flipped:
            moved[:, 0] = crop_width - moved[:, 0]
        return moved

    def _cut(self, image: Tensor) -> Tensor:
        """Crops a resized image or mask (..., H, W), and mirrors it if the view is flipped."""
        top, left, height, width = self.crop
        cut = image[..., top : top + height, left : left + width]
        return (cut.flip(-1) if self.flipped else cut).contiguous()


def whole_view(height: int, width: int) -> View:
    """Returns the view that leaves an image of `height` and `width` pixels unchanged."""
    return View((height, width), (height, width), (0, 0, height, width), False)


def resized_view(
    height: int, width: int, *, short_side: int, long_side: int, flipped: bool = False
) -> View:
    """Returns the view of a whole image at another size, with the same aspect ratio.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        short_side: Length of the view's shorter side, in pixels. It becomes less if the longer side
            would exceed `long_side`.
        long_side: Largest length of the view's longer side, in pixels.
        flipped: Whether the view is mirrored horizontally.
    """
    ratio = min(short_side / min(height, width), long_side / max(height, width))
    resized = scaled(height, width, ratio)
    return View((height, width), resized, (0, 0, *resized), flipped)


def scaled(height: int, width: int, ratio: float) -> tuple[int, int]:
    """Returns a size in pixels: `height` and `width` times `ratio`, rounded, each at least 1."""
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def sizes_of(images: Sequence[Tensor]) -> Tensor:
    """Returns the height and width of each of B images (..., H, W), as (B, 2) int64."""
    return torch.tensor([image.shape[-2:] for image in images])


def padded(image: Tensor, canvas: tuple[int, int], value: int = 0) -> Tensor:
    """Pads an image (..., H, W) at the bottom and the right to a larger size.

    Args:
        image: The image.
        canvas: Height and width of the result.
        value: Value of the padding.
    """
    height, width = image.shape[-2:]
    return F.pad(image, (0, canvas[1] - width, 0, canvas[0] - height), value=value)

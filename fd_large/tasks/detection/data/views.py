"""Random resizing and flipping of training images, with a crop of fixed size or as whole images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from fd_large.tasks.dense.geometry import View, resized_view, scaled

NUM_DRAWS = 4  # flip, scale, top, left
FLIP_PROBABILITY = 0.5


class Jitter(Protocol):
    """The interface of a class that draws random views of training images.

    Attributes:
        canvas: Height and width to which all views are padded, or None if each view keeps its own
            size.
    """

    canvas: tuple[int, int] | None

    def view(self, height: int, width: int, draws: Sequence[float]) -> View:
        """Returns a random view of an image.

        Args:
            height: Height of the image.
            width: Width of the image.
            draws: `NUM_DRAWS` uniform random numbers in [0, 1).
        """


class LargeScaleJitter:
    """Large-scale jitter: resizes an image by a random scale, then takes a random crop.

    The scale and the position of the crop are uniformly distributed, and the aspect ratio is kept.
    Views smaller than the canvas are padded by the loader.

    Source: Ghiasi et al., "Simple copy-paste", CVPR 2021; as in detectron2 (ResizeScale,
        FixedSizeCrop).
    """

    def __init__(self, image_size: int, *, min_scale: float = 0.1, max_scale: float = 2.0) -> None:
        """Sets the size of the crop and the range of scales.

        Args:
            image_size: Side of the square canvas, in pixels. At scale 1 an image just fits into it.
            min_scale: Smallest scale, above 0.
            max_scale: Largest scale.
        """
        assert image_size > 0
        assert 0 < min_scale <= max_scale
        self.canvas = (image_size, image_size)
        self._scales = (min_scale, max_scale)

    def view(self, height: int, width: int, draws: Sequence[float]) -> View:
        """Returns a random view of an image.

        Args:
            height: Height of the image.
            width: Width of the image.
            draws: `NUM_DRAWS` uniform random numbers in [0, 1).
        """
        draw_flip, draw_scale, draw_top, draw_left = draws
        low, high = self._scales
        side = self.canvas[0]
        ratio = side * (low + (high - low) * draw_scale) / max(height, width)
        resized = scaled(height, width, ratio)
        rows, columns = min(side, resized[0]), min(side, resized[1])
        top = int(draw_top * (resized[0] - rows + 1))
        left = int(draw_left * (resized[1] - columns + 1))
        crop = (top, left, rows, columns)
        return View((height, width), resized, crop, draw_flip < FLIP_PROBABILITY)


class ShortestEdge:
    """Resizes a whole image to a random length of its shorter side, and flips it at random.

    The length is a whole number of pixels, uniformly distributed in a range.

    Source: detectron2 (ResizeShortestEdge).
    """

    canvas = None

    def __init__(self, min_short_side: int, max_short_side: int, long_side: int) -> None:
        """Sets the range of lengths.

        Args:
            min_short_side: Smallest length of the shorter side, in pixels.
            max_short_side: Largest length of the shorter side, in pixels.
            long_side: Upper limit of the longer side, in pixels. An image whose longer side would
                exceed this limit is made smaller, even if its shorter side then has less than
                `min_short_side` pixels.
        """
        assert 0 < min_short_side <= max_short_side
        self._short_sides, self._long_side = (min_short_side, max_short_side), long_side

    def view(self, height: int, width: int, draws: Sequence[float]) -> View:
        """Returns a random view of an image.

        Args:
            height: Height of the image.
            width: Width of the image.
            draws: `NUM_DRAWS` uniform random numbers in [0, 1).
        """
        draw_flip, draw_size, *_ = draws
        low, high = self._short_sides
        return resized_view(
            height,
            width,
            short_side=low + int(draw_size * (high - low + 1)),
            long_side=self._long_side,
            flipped=draw_flip < FLIP_PROBABILITY,
        )

"""Views of an image: a random square crop in training, squares or the whole image in tests.

Sources: the training views of GLPDepth (arXiv 2201.07436) and MIM-Depth (arXiv 2205.13543), with
the colour changes of albumentations, and the test of MIM-Depth. Tests compare the results.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large.data.random_numbers import uniforms
from fd_large.tasks.dense.color import linear, to_hsv, to_rgb
from fd_large.tasks.dense.geometry import View, resized_view
from fd_large.tasks.dense.windows import Window, num_forwards

FLIP_PROBABILITY = 0.5
# CutDepth: the largest width of a strip, as a share of the columns from its left edge on.
WIDEST_STRIP = 0.75
# Probability of each of the three changes of colour.
COLOR_PROBABILITY = 0.5
BRIGHTNESS, CONTRAST, GAMMAS = 0.2, 0.2, (0.8, 1.2)
# Largest shifts: of hue, in 180 steps of the circle, and of saturation and value, in 0..255.
HUE, SATURATION, VALUE = 20.0, 30.0, 20.0
# A limit of the longer side that no image reaches.
UNLIMITED = 1 << 30

StripBytes = Literal["scaled", "wrapped"]


class Drawn(NamedTuple):
    """The random numbers that determine a training view, each in [0, 1).

    Attributes:
        place: Three numbers, for the flip, and for top and left of the crop.
        strip: Two numbers, for start and width of the strip that shows the depth; None for no
            strip.
        colors: Nine numbers for `changed_colors`.
    """

    place: tuple[float, float, float]
    strip: tuple[float, float] | None
    colors: tuple[float, ...]


class TrainingViews(NamedTuple):
    """Random resizing, cropping, mirroring and colour changes of training images.

    Attributes:
        image_size: Side of the square crop, in pixels. An image is first resized so that its
            shorter side has this length.
        colors: Whether colours are changed (`changed_colors`).
        cut_depth: Share of the images in which a strip of columns shows the depth (CutDepth).
        cut_depth_bytes: Pixel values of the strip. "scaled": the depth, with 255 at `max_depth` and
            beyond. "wrapped": the numbers of the depth file modulo 256, as in the published code;
            the images with a strip are then at regular positions of the epoch.
        max_depth: Largest depth of the head, in metres.
        depth_scale: Units of a depth file per metre.
    """

    image_size: int
    colors: bool = True
    cut_depth: float = 0.25
    cut_depth_bytes: StripBytes = "scaled"
    max_depth: float = 10.0
    depth_scale: float = 1000.0

    @property
    def unknown(self) -> np.float32:
        """The value of pixels whose depth is unknown: 0."""
        return np.float32(0)

    def draws(self, seed: int, epoch: int, positions: NDArray[np.int64]) -> list[Drawn]:
        """Returns the random numbers for the view at each position of the epoch.

        Args:
            seed: The run's seed.
            epoch: Epoch, counted from 0.
            positions: (B,), positions in the epoch's order.
        """
        places = uniforms(seed, epoch, positions, "jitter", 6)
        if self.cut_depth_bytes == "wrapped" and self.cut_depth:
            cut = positions % round(1 / self.cut_depth) == 0
        else:
            cut = places[:, 3] < self.cut_depth
        colors = uniforms(seed, epoch, positions, "color", 9)
        return [
            Drawn(tuple(place[:3]), tuple(place[4:]) if strip else None, tuple(color))
            for place, strip, color in zip(
                places.tolist(), cut.tolist(), colors.tolist(), strict=True
            )
        ]

    def view(
        self, image: Tensor, depths: NDArray[np.float32], drawn: Drawn
    ) -> tuple[Tensor, NDArray[np.float32]]:
        """Returns a random square of an image, (3, S, S) uint8, and its depths, (S, S), in metres.

        S is the field `image_size`.

        Args:
            image: (3, H, W) uint8.
            depths: (H, W), in metres; 0 where the depth is unknown.
            drawn: An item of `draws`.
        """
        if drawn.strip is not None:
            image = self._with_strip(image, depths, drawn.strip)
        flip, *corner = drawn.place
        side, size = self.image_size, (image.shape[-2], image.shape[-1])
        whole = resized_view(*size, short_side=side, long_side=UNLIMITED)
        top, left = (
            int(draw * (length - side + 1))
            for draw, length in zip(corner, whole.resized, strict=True)
        )
        view = View(size, whole.resized, (top, left, side, side), flip < FLIP_PROBABILITY)
        pixels = view.image(image)
        if self.colors:
            changed = changed_colors(pixels.permute(1, 2, 0).numpy(), drawn.colors)
            pixels = torch.from_numpy(changed).permute(2, 0, 1).contiguous()
        return pixels, view.numbers(depths)

    def _with_strip(
        self, image: Tensor, depths: NDArray[np.float32], draws: tuple[float, float]
    ) -> Tensor:
        """Returns a copy of an image in which a strip of columns shows the depth.

        The fields `cut_depth_bytes`, `max_depth` and `depth_scale` decide which depth gets which
        pixel value.

        Args:
            image: (3, H, W) uint8.
            depths: (H, W), in metres; 0 where the depth is unknown.
            draws: Two numbers in [0, 1), for start and width of the strip.
        """
        start, width = draws
        columns = image.shape[-1]
        first = int(start * columns)
        last = first + int(max((columns - start * columns) * width * WIDEST_STRIP, 1))
        strip = depths[:, first:last]
        if self.cut_depth_bytes == "wrapped":
            shown = np.rint(strip * np.float32(self.depth_scale)).astype(np.int64) % 256
        else:
            shown = np.minimum(strip / self.max_depth, 1) * 255
        image = image.clone()
        image[:, :, first:last] = torch.from_numpy(shown.astype(np.uint8))
        return image


def changed_colors(image: NDArray[np.uint8], draws: tuple[float, ...]) -> NDArray[np.uint8]:
    """Changes an image's brightness and contrast, its gamma, and its hue, saturation and value.

    Each of these three changes is made with probability 1/2. Values are clipped to 0..255 and
    rounded down.

    Args:
        image: (H, W, 3) uint8, red, green and blue.
        draws: Nine random numbers in [0, 1), which decide whether each change is made, and its
            strength.

    Returns: (H, W, 3) uint8, the changed image.
    Source: RandomBrightnessContrast, RandomGamma and HueSaturationValue of albumentations 1.1.
    """
    is_linear, brightness, contrast, has_gamma, gamma, is_shifted, *shifts = draws
    if is_linear < COLOR_PROBABILITY:
        factor, shift = 1 + CONTRAST * (2 * contrast - 1), BRIGHTNESS * (2 * brightness - 1)
        image = linear(image, factor, 255 * shift)
    if has_gamma < COLOR_PROBABILITY:
        low, high = GAMMAS
        powers = (np.arange(256) / 255) ** (low + (high - low) * gamma)
        image = (255 * powers).astype(np.uint8)[image]
    if is_shifted < COLOR_PROBABILITY:
        hue, saturation, value = (
            most * (2 * draw - 1)
            for most, draw in zip((HUE, SATURATION, VALUE), shifts, strict=True)
        )
        hsv = to_hsv(image)
        hsv[..., 0] = ((hsv[..., 0] + hue) % 180).astype(np.uint8)
        hsv[..., 1] = linear(hsv[..., 1], 1.0, saturation)
        hsv[..., 2] = linear(hsv[..., 2], 1.0, value)
        image = to_rgb(hsv)
    return image


class TestViews(NamedTuple):
    """The size at which an image is tested, whole or by squares.

    Attributes:
        image_size: Length of the shorter side to which an image is resized, in pixels; also the
            side of the squares.
        windows: Number of squares along the longer side; 0 for whole images.
        flip: Whether the model also sees each square, or the whole image, mirrored. The two
            predictions are then averaged.
    """

    # No test of pytest's.
    __test__ = False

    image_size: int
    windows: int = 0
    flip: bool = False

    def views(self, height: int, width: int) -> list[View]:
        """Returns a list of one item, the resized view of an image.

        Args:
            height: Height of the image, in pixels.
            width: Width of the image, in pixels.
        """
        return [resized_view(height, width, short_side=self.image_size, long_side=UNLIMITED)]

    def squares(self, height: int, width: int) -> list[Window]:
        """Returns up to `windows` squares along the longer side of a view, as in MIM-Depth.

        The distance from square to square is rounded down to whole pixels, so that the last pixels
        of the longer side may be in no square. With few squares, there may also be gaps between
        them.

        Args:
            height: Height of the view, in pixels.
            width: Width of the view, in pixels.
        """
        side, longer = min(height, width), max(height, width)
        step = (longer - side) // max(self.windows - 1, 1)
        starts = dict.fromkeys(i * step for i in range(self.windows))
        return [_square(start, side, height <= width) for start in starts]

    def rest(self, height: int, width: int) -> list[Window]:
        """Returns squares that cover the pixels which are in no square of `squares`.

        The list is empty if there are no such pixels.

        Args:
            height: Height of the view, in pixels.
            width: Width of the view, in pixels.
        """
        side, longer = min(height, width), max(height, width)
        covered, rest = np.zeros(longer, bool), []
        for square in self.squares(height, width):
            start = max(square[:2])
            covered[start : start + side] = True
        while not covered.all():
            start = min(int(np.argmin(covered)), longer - side)
            rest.append(_square(start, side, height <= width))
            covered[start : start + side] = True
        return rest

    def num_forwards(self, height: int, width: int, at_once: int) -> int:
        """Returns the number of forwards for an image.

        Args:
            height: Height of the image, in pixels.
            width: Width of the image, in pixels.
            at_once: Largest number of squares in a forward.
        """
        forwards = 1
        if self.windows:
            (view,) = self.views(height, width)
            parts = self.squares(*view.size), self.rest(*view.size)
            forwards = sum(num_forwards(part, at_once) for part in parts)
        return 2 * forwards if self.flip else forwards


def _square(start: int, side: int, across: bool) -> Window:
    return (0, start, side, start + side) if across else (start, 0, start + side, side)

"""Makes a view of an image by a random crop, flip and colour jitter.

The random numbers of a view are drawn by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Literal, NamedTuple

import torch
from numpy.typing import ArrayLike
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from fd_large.data.decode import decode, size_before_decoding
from fd_large.data.image_header import MAX_PIXELS
from fd_large.data.random_numbers import uniforms
from fd_large.data.source import ImageSource

NUM_TRIES = 10
NUM_DRAWS = 3 + 2 * NUM_TRIES  # flip, top, left, then area and aspect of each try
MIN_ASPECT, MAX_ASPECT = 3 / 4, 4 / 3
FLIP_PROBABILITY = 0.5
NUM_COLOR_DRAWS = 6  # brightness, contrast, saturation, hue, order, grayscale
# SimCLR's proportion of the four: 0.8, 0.8, 0.8 and 0.2 times the strength.
HUE_SHARE = 0.25
_ORDERS = tuple(permutations(range(4)))


@dataclass(frozen=True)
class ViewSettings:
    """Settings of the views of images.

    Attributes:
        image_size: Side of the view, in pixels.
        min_crop_scale: Smallest area of the crop, as a fraction of the image's area in (0, 1].
        max_pixels: Largest number of pixels of an image. Larger images are not decoded, and raise a
            DataError.
        color_jitter: Strength of the color jitter, in [0, 1]; 0 turns it off.
        grayscale_probability: Probability of a grey view, in [0, 1].
        interpolation: Interpolation of the resize, which is antialiased.
        cuts_boxes: Whether a crop box that exceeds the image is cut to the image; if False, another
            box is tried instead.
    """

    image_size: int
    min_crop_scale: float
    max_pixels: int = MAX_PIXELS
    color_jitter: float = 0.0
    grayscale_probability: float = 0.0
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    cuts_boxes: bool = False


class Draws(NamedTuple):
    """The random numbers of one view, each in [0, 1).

    Attributes:
        crop: `NUM_DRAWS` numbers for the crop box and the flip.
        color: `NUM_COLOR_DRAWS` numbers for the colour jitter and the grey view.
    """

    crop: Sequence[float]
    color: Sequence[float]


def view_draws(seed: int, epoch: int, places: ArrayLike) -> list[Draws]:
    """Returns the random numbers of a view for each place, which depend on (seed, epoch, place).

    The places are whole numbers from 0, (B,), such as positions in the epoch's order.
    """
    crops = uniforms(seed, epoch, places, "view", NUM_DRAWS).tolist()
    colors = uniforms(seed, epoch, places, "color", NUM_COLOR_DRAWS).tolist()
    return [Draws(*draws) for draws in zip(crops, colors, strict=True)]


class FixedViews(NamedTuple):
    """A fixed number of views for each image, which recur: epoch e uses view e modulo `count`.

    A view, with its flip, depends only on the seed, the view's number and the image's index,
    although the order of images changes from epoch to epoch.

    Attributes:
        count: Number of views of each image.
        seed: Seed of the views, which may differ from the seed of the run.
    """

    count: int
    seed: int

    def draws(self, epoch: int, index: int) -> Draws:
        """Returns the random numbers of the view of image `index` in an epoch, counted from 0."""
        return view_draws(self.seed, epoch % self.count, [index])[0]


def jittered_view(
    source: ImageSource, index: int, draws: Draws, settings: ViewSettings
) -> torch.Tensor:
    """Reads an image, and returns a view with crop, flip and colour jitter.

    Returns: (3, image_size, image_size) uint8.
    Raises: DataError: if the image cannot be read or decoded.
    """
    return jitter_color(
        random_view(source, index, draws.crop, settings),
        draws.color,
        strength=settings.color_jitter,
        grayscale_probability=settings.grayscale_probability,
    )


def random_view(
    source: ImageSource, index: int, draws: Sequence[float], settings: ViewSettings
) -> torch.Tensor:
    """Reads an image, crops a random box, resizes the crop, and flips it with probability 1/2.

    If the size is known before decoding, the rows below the box are not decoded. Of the settings,
    those of colours are not used here (`jitter_color`). There are `NUM_DRAWS` numbers `draws`, each
    in [0, 1).

    Returns: (3, image_size, image_size) uint8, contiguous.
    Raises: DataError: if the image cannot be read or decoded.
    """
    encoded, where = source.read(index), source[index]
    size, image = size_before_decoding(encoded), None
    if size is None:
        image = decode(encoded, where, max_pixels=settings.max_pixels)
        size = image.shape[-2:]
    box = crop_box(
        *size, draws, min_crop_scale=settings.min_crop_scale, cuts_boxes=settings.cuts_boxes
    )
    if image is None:
        bottom = box[0] + box[2]
        image = decode(encoded, where, max_pixels=settings.max_pixels, num_rows=bottom)
    return box_view(
        image, box, draws, image_size=settings.image_size, interpolation=settings.interpolation
    )


def crop_box(
    height: int,
    width: int,
    draws: Sequence[float],
    *,
    min_crop_scale: float,
    cuts_boxes: bool = False,
) -> tuple[int, int, int, int]:
    """Returns a random crop box, uniform in area and log aspect as torchvision's RandomResizedCrop.

    The aspect is width / height, from 3/4 to 4/3. The first of `NUM_TRIES` boxes that fits into the
    image is taken. If none fits, the largest central box with an allowed aspect is taken.
    torchvision draws the position of the box after its size. Here the position is drawn before,
    which gives the same distribution with a fixed number of draws.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        draws: `NUM_DRAWS` numbers in [0, 1).
        min_crop_scale: Smallest area of the box, as a fraction of the image's area.
        cuts_boxes: Whether to take the first box and cut it to the image, as BYOL's crop for linear
            probes does.

    Returns: top, left, height, width of the box, in pixels.
    """
    log_min, log_max = math.log(MIN_ASPECT), math.log(MAX_ASPECT)
    _, draw_top, draw_left, *tries = draws
    for draw_area, draw_aspect in zip(tries[0::2], tries[1::2], strict=True):
        area = height * width * (min_crop_scale + (1 - min_crop_scale) * draw_area)
        aspect = math.exp(log_min + (log_max - log_min) * draw_aspect)
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if cuts_boxes:
            box_width, box_height = (
                max(1, min(side, limit))
                for side, limit in ((box_width, width), (box_height, height))
            )
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(draw_top * (height - box_height + 1))
            left = int(draw_left * (width - box_width + 1))
            return top, left, box_height, box_width

    box_height, box_width = height, width
    if width < MIN_ASPECT * height:
        box_height = round(width / MIN_ASPECT)
    elif width > MAX_ASPECT * height:
        box_width = round(height * MAX_ASPECT)
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def box_view(
    image: torch.Tensor,
    box: tuple[int, int, int, int],
    draws: Sequence[float],
    *,
    image_size: int,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> torch.Tensor:
    """Crops a box, resizes the crop and perhaps flips it; only the box's pixels affect the view.

    The pixels equal those of a pipeline with Pillow except for rare ties. On a CPU without AVX2 or
    NEON, torch resizes in floats, and some pixels differ by one grey level.

    Args:
        image: (3, H, W) uint8; rows below the box may be missing.
        box: Top, left, height, width of the box, in pixels.
        draws: The `NUM_DRAWS` numbers in [0, 1) from which the box was made; the first of them
            decides the flip.
        image_size: Side of the view, in pixels.
        interpolation: Interpolation of the resize, which is antialiased.

    Returns: (3, image_size, image_size) uint8, contiguous.
    """
    top, left, height, width = box
    # What torchvision's resized_crop does on uint8, without its dispatch (a tenth of the time).
    view = F.interpolate(
        image[None, :, top : top + height, left : left + width],
        (image_size, image_size),
        mode=interpolation,
        antialias=True,
    )[0]
    if draws[0] < FLIP_PROBABILITY:
        view = view.flip(-1)
    return view.contiguous()


def jitter_color(
    image: torch.Tensor, draws: Sequence[float], *, strength: float, grayscale_probability: float
) -> torch.Tensor:
    """Changes the brightness, contrast, saturation and hue of an image, and perhaps makes it grey.

    The four changes are made in a random order. The factors are uniform as in torchvision's
    ColorJitter(strength, strength, strength, strength / 4): brightness, contrast and saturation in
    1 -+ strength, hue by -+ strength / 4 of the circle.

    Args:
        image: (3, H, W) uint8.
        draws: `NUM_COLOR_DRAWS` numbers in [0, 1).
        strength: 0 (none) to 1.
        grayscale_probability: Probability of three equal channels, in [0, 1].

    Returns: (3, H, W) uint8.
    Source: Chen et al., "A simple framework for contrastive learning of visual representations",
        ICML 2020, appendix A.
    """
    *amounts, order, gray = draws
    if strength > 0:
        brightness, contrast, saturation, hue = (strength * (2 * draw - 1) for draw in amounts)
        steps = (
            lambda x: transforms.adjust_brightness(x, 1 + brightness),
            lambda x: transforms.adjust_contrast(x, 1 + contrast),
            lambda x: transforms.adjust_saturation(x, 1 + saturation),
            lambda x: transforms.adjust_hue(x, HUE_SHARE * hue),
        )
        for number in _ORDERS[int(order * len(_ORDERS))]:
            image = steps[number](image)
    if gray < grayscale_probability:
        image = transforms.rgb_to_grayscale(image, num_output_channels=3)
    return image

"""One view of an image: a random resized crop and a flip, from numbers drawn by the caller."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch.nn import functional as F

NUM_TRIES = 10
NUM_DRAWS = 3 + 2 * NUM_TRIES  # flip, top, left, then area and aspect of each try
MIN_ASPECT, MAX_ASPECT = 3 / 4, 4 / 3
FLIP_PROBABILITY = 0.5


def crop_box(
    height: int, width: int, draws: Sequence[float], *, min_crop_scale: float
) -> tuple[int, int, int, int]:
    """A random box: area and log aspect uniform, as in torchvision's RandomResizedCrop.

    The first of ten tries that fits into the image is taken, else the largest box in the
    middle whose aspect is allowed. torchvision draws the place after the try that fits; one
    place drawn beforehand has the same distribution and a fixed number of draws.

    Args:
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        draws: `NUM_DRAWS` numbers in [0, 1).
        min_crop_scale: Smallest area, as a part of the picture's.

    Returns: top, left, height, width of the box, in pixels.
    """
    log_min, log_max = math.log(MIN_ASPECT), math.log(MAX_ASPECT)
    _, draw_top, draw_left, *tries = draws
    for draw_area, draw_aspect in zip(tries[0::2], tries[1::2], strict=True):
        area = height * width * (min_crop_scale + (1 - min_crop_scale) * draw_area)
        aspect = math.exp(log_min + (log_max - log_min) * draw_aspect)
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
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


def random_view(
    image: torch.Tensor, draws: Sequence[float], *, image_size: int, min_crop_scale: float
) -> torch.Tensor:
    """Crops a random box, resizes it (bilinear, antialiased) and flips it in half of the cases.

    Args:
        image: (3, H, W) uint8.
        draws: `NUM_DRAWS` numbers in [0, 1).
        image_size: Side of the view, in pixels.
        min_crop_scale: Smallest crop area, as a part of the picture's.

    Returns: (3, image_size, image_size) uint8, contiguous.
    """
    box = crop_box(*image.shape[-2:], draws, min_crop_scale=min_crop_scale)
    return box_view(image, box, draws, image_size=image_size)


def box_view(
    image: torch.Tensor,
    box: tuple[int, int, int, int],
    draws: Sequence[float],
    *,
    image_size: int,
    interpolation: Literal["bilinear", "bicubic"] = "bilinear",
) -> torch.Tensor:
    """The view of a box; what of the image lies outside it does not matter.

    The pixels are those of the Pillow pipeline but for rare ties. Where a CPU has neither AVX2 nor
    NEON, torchvision resizes in floats: some pixels then differ by one grey level.

    Args:
        image: (3, H, W) uint8; rows below the box may be missing.
        box: Top, left, height, width, in pixels.
        draws: `NUM_DRAWS` numbers in [0, 1), those that the box came from.
        image_size: Side of the view, in pixels.
        interpolation: Of the resize, antialiased.

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

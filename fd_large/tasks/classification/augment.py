"""RandAugment and random erasing as in timm, with random numbers that the caller draws.

RandAugment is timm's `rand-mM-mstdS-inc1`. For an image, two operations are drawn from the
operations whose severity grows with the magnitude. Each is applied with probability 1/2, at a
magnitude drawn around M. The operations are timm's own code; the argument `draws` replaces timm's
random numbers from Python's global generator.

Sources: Cubuk et al., arXiv 1909.13719; Zhong et al., arXiv 1708.04896; timm/data/auto_augment.py
and random_erasing.py (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP
from torch import Tensor

from fd_large.backbones.statistics import Statistics

NUM_OPERATIONS = 2
APPLY_PROBABILITY = 0.5
# Random numbers for the operation, whether it is applied, its magnitude (two) and its sign.
DRAWS_AN_OPERATION = 5
NUM_AUGMENTATION_DRAWS = NUM_OPERATIONS * DRAWS_AN_OPERATION

LARGEST_MAGNITUDE = 10.0
NO_BITS = (0,)

ERASING_TRIES = 10
# Random numbers for whether a box is erased, its top and left, and area and aspect of each try.
NUM_ERASING_DRAWS = 3 + 2 * ERASING_TRIES
MIN_ERASED, MAX_ERASED = 0.02, 1 / 3
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))

# Maps (share of the largest magnitude, sign) to the arguments of timm's operation.
Level = Callable[[float, float], tuple[float, ...]]


def _enhance(share: float, sign: float) -> tuple[float, ...]:
    """Returns the factor by which timm changes colour, contrast, brightness or sharpness.

    Args:
        share: The magnitude as a share of the largest magnitude, 0 to 1.
        sign: 1 to increase, -1 to decrease.

    Returns: (factor,), with a factor of at least 0.1.
    """
    return (max(0.1, 1.0 + sign * 0.9 * share),)


OPERATIONS: dict[str, Level] = {
    "AutoContrast": lambda share, sign: (),
    "Equalize": lambda share, sign: (),
    "Invert": lambda share, sign: (),
    "Rotate": lambda share, sign: (sign * 30.0 * share,),
    "PosterizeIncreasing": lambda share, sign: (4 - int(4 * share),),
    "SolarizeIncreasing": lambda share, sign: (256 - min(256, int(256 * share)),),
    "SolarizeAdd": lambda share, sign: (min(128, int(110 * share)),),
    "ColorIncreasing": _enhance,
    "ContrastIncreasing": _enhance,
    "BrightnessIncreasing": _enhance,
    "SharpnessIncreasing": _enhance,
    "ShearX": lambda share, sign: (sign * 0.3 * share,),
    "ShearY": lambda share, sign: (sign * 0.3 * share,),
    "TranslateXRel": lambda share, sign: (sign * 0.45 * share,),
    "TranslateYRel": lambda share, sign: (sign * 0.45 * share,),
}
_NAMES = tuple(OPERATIONS)


def augment(
    image: Tensor, draws: Sequence[float], *, magnitude: float, std: float, statistics: Statistics
) -> Tensor:
    """Applies RandAugment to an image.

    Args:
        image: (3, H, W) uint8.
        draws: `NUM_AUGMENTATION_DRAWS` random numbers in [0, 1).
        magnitude: Mean magnitude of an operation, 0 to 10.
        std: Standard deviation of the magnitude, which is normally distributed and then clipped to
            0 to 10.
        statistics: Mean and deviation that normalise images; the mean fills the pixels that a
            shear, shift or rotation uncovers.

    Returns: (3, H, W) uint8, contiguous.
    """
    pillow = None
    for start in range(0, NUM_AUGMENTATION_DRAWS, DRAWS_AN_OPERATION):
        which, applied, first, second, sign = draws[start : start + DRAWS_AN_OPERATION]
        if applied >= APPLY_PROBABILITY:
            continue
        drawn = magnitude + std * float(normals(np.array([first]), np.array([second]))[0])
        share = min(max(drawn, 0.0), LARGEST_MAGNITUDE) / LARGEST_MAGNITUDE
        name = _NAMES[int(which * len(_NAMES))]
        if pillow is None:
            pillow = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
        arguments = OPERATIONS[name](share, 1.0 if sign < 0.5 else -1.0)
        if arguments == NO_BITS and name == "PosterizeIncreasing":
            # No bits remain at the largest magnitude: earlier Pillows gave black, 12 refuses.
            pillow = Image.new("RGB", pillow.size)
            continue
        pillow = NAME_TO_OP[name](
            pillow,
            *arguments,
            fillcolor=tuple(min(255, round(255 * value)) for value in statistics.mean),
            resample=Image.Resampling.BICUBIC,
        )
    if pillow is None:
        return image
    return torch.from_numpy(np.array(pillow)).permute(2, 0, 1).contiguous()


def erasing_box(
    height: int, width: int, draws: Sequence[float], *, probability: float
) -> tuple[int, int, int, int] | None:
    """Draws the box to erase from an image, or None to erase nothing.

    The area is uniform between 2% and a third of the image's area, and the logarithm of the aspect
    ratio is uniform between log 0.3 and -log 0.3. Of ten drawn boxes, the first whose sides are
    shorter than the image's is used. If there is none, nothing is erased.

    Args:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        draws: `NUM_ERASING_DRAWS` random numbers in [0, 1).
        probability: Probability that a box is erased.

    Returns: top, left, height and width of the box, or None.
    """
    apply, draw_top, draw_left, *tries = draws
    if apply >= probability:
        return None
    for draw_area, draw_aspect in zip(tries[0::2], tries[1::2], strict=True):
        area = height * width * (MIN_ERASED + (MAX_ERASED - MIN_ERASED) * draw_area)
        aspect = math.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * draw_aspect)
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < height and columns < width:
            top = int(draw_top * (height - rows + 1))
            left = int(draw_left * (width - columns + 1))
            return top, left, rows, columns
    return None


def normals(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns standard normal numbers, computed from uniform numbers by the Box-Muller transform.

    Args:
        first: Uniform numbers in [0, 1), in an array of any shape.
        second: Uniform numbers in [0, 1), independent of `first`, in an array of the same shape.

    Returns: a normal number for each pair of numbers, in the same shape.
    """
    return np.sqrt(-2.0 * np.log1p(-first)) * np.cos(2.0 * np.pi * second)

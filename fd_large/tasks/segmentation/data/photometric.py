"""Random changes of brightness, contrast, saturation and hue of a training image.

Source: Liu et al., arXiv 1512.02325 (SSD); order and ranges are those of mmsegmentation's
PhotoMetricDistortion.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fd_large.tasks.dense.color import linear, to_hsv, to_rgb

NUM_DRAWS = 9  # four changes: whether each is made and how strongly; and when contrast changes
BRIGHTNESS, FACTORS, HUES = 32.0, (0.5, 1.5), 18


def distort(image: NDArray[np.uint8], draws: Sequence[float]) -> NDArray[np.uint8]:
    """Changes brightness, contrast, saturation and hue of an image, each with probability 1/2.

    The contrast changes before saturation and hue or after them, with probability 1/2 each. After
    every change, values are clipped to 0..255 and rounded down.

    Args:
        image: (H, W, 3) uint8, red, green and blue.
        draws: `NUM_DRAWS` uniform random numbers in [0, 1).

    Returns: (H, W, 3) uint8, the changed image.
    """
    brighter, shift, first, contrasts, contrast, saturates, saturation, turns, hue = draws
    if brighter < 0.5:
        image = linear(image, 1.0, BRIGHTNESS * (2 * shift - 1))
    if first < 0.5 and contrasts < 0.5:
        image = linear(image, _factor(contrast), 0.0)
    if saturates < 0.5 or turns < 0.5:
        hsv = to_hsv(image)
        if saturates < 0.5:
            hsv[..., 1] = linear(hsv[..., 1], _factor(saturation), 0.0)
        if turns < 0.5:
            step = int(2 * HUES * hue) - HUES
            hsv[..., 0] = (hsv[..., 0].astype(np.int16) + step) % 180
        image = to_rgb(hsv)
    if first >= 0.5 and contrasts < 0.5:
        image = linear(image, _factor(contrast), 0.0)
    return image


def _factor(draw: float) -> float:
    low, high = FACTORS
    return low + (high - low) * draw

"""Random brightness, contrast, saturation and hue of a training image.

Source: Liu et al., arXiv 1512.02325 (SSD); the order and ranges of mmsegmentation's
PhotoMetricDistortion. OpenCV is not needed for it: hue counts 180 steps here as there.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

NUM_DRAWS = 9  # for each of four changes whether and how much, and the place of contrast
BRIGHTNESS, FACTORS, HUES = 32.0, (0.5, 1.5), 18


def distort(image: NDArray[np.uint8], draws: Sequence[float]) -> NDArray[np.uint8]:
    """Changes colours; each of the four changes is made with probability 1/2.

    Args:
        image: (H, W, 3) uint8, red, green and blue.
        draws: `NUM_DRAWS` numbers in [0, 1).

    Returns: the same shape; after every change values are cut to 0..255 and rounded down.
    """
    brighter, shift, first, contrasts, contrast, saturates, saturation, turns, hue = draws
    if brighter < 0.5:
        image = _linear(image, 1.0, BRIGHTNESS * (2 * shift - 1))
    if first < 0.5 and contrasts < 0.5:
        image = _linear(image, _factor(contrast), 0.0)
    if saturates < 0.5 or turns < 0.5:
        hsv = to_hsv(image)
        if saturates < 0.5:
            hsv[..., 1] = _linear(hsv[..., 1], _factor(saturation), 0.0)
        if turns < 0.5:
            step = int(2 * HUES * hue) - HUES
            hsv[..., 0] = (hsv[..., 0].astype(np.int16) + step) % 180
        image = to_rgb(hsv)
    if first >= 0.5 and contrasts < 0.5:
        image = _linear(image, _factor(contrast), 0.0)
    return image


def to_hsv(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Maps (H, W, 3) red, green, blue to hue in 0..179, saturation and value in 0..255."""
    rgb = image.astype(np.float32)
    value, least = rgb.max(-1), rgb.min(-1)
    spread = value - least
    safe = np.where(spread > 0, spread, 1)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    hue = np.where(
        value == red,
        (green - blue) / safe,
        np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    saturation = 255 * spread / np.where(value > 0, value, 1)
    parts = (np.round(30 * hue) % 180, np.round(saturation), value)
    return np.stack(parts, axis=-1).astype(np.uint8)


def to_rgb(hsv: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Maps what `to_hsv` returns back to red, green and blue."""
    hue, saturation, value = np.moveaxis(hsv.astype(np.float32), -1, 0)
    chroma = value * saturation / 255
    # Distance of each colour from the hue, in sixths of the circle.
    places = (np.array([5.0, 3.0, 1.0], np.float32) + hue[..., None] / 30) % 6
    shares = np.clip(np.minimum(places, 4 - places), 0, 1)
    return np.round(value[..., None] - chroma[..., None] * shares).astype(np.uint8)


def _factor(draw: float) -> float:
    low, high = FACTORS
    return low + (high - low) * draw


def _linear(values: NDArray[np.uint8], factor: float, shift: float) -> NDArray[np.uint8]:
    return np.clip(values.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)

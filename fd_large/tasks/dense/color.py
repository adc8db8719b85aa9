"""Changes the colours of uint8 images: brightness, contrast, and hue, saturation and value.

The code does not need OpenCV; hue has 180 steps as in OpenCV.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def linear(values: NDArray[np.uint8], factor: float, shift: float) -> NDArray[np.uint8]:
    """Returns `values` * `factor` + `shift`, clipped to 0..255 and rounded down."""
    return np.clip(values.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


def to_hsv(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Converts an image from red, green and blue to hue, saturation and value.

    Hue is in 0..179; saturation and value are in 0..255.

    Args:
        image: (H, W, 3) uint8.

    Returns: (H, W, 3) uint8.
    """
    # Plane by plane: NumPy is slow along an axis of three.
    red, green, blue = (image[..., i].astype(np.float32) for i in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    safe = np.where(spread > 0, spread, np.float32(1))
    hue = np.where(
        value == red,
        (green - blue) / safe,
        np.where(value == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    saturation = 255 * spread / np.where(value > 0, value, 1)
    parts = (np.round(30 * hue) % 180, np.round(saturation), value)
    return np.stack(parts, axis=-1).astype(np.uint8)


def to_rgb(hsv: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Converts an image from hue, saturation and value to red, green and blue.

    Args:
        hsv: (H, W, 3) uint8, in the ranges of the result of `to_hsv`.

    Returns: (H, W, 3) uint8.
    """
    hue, saturation, value = (hsv[..., i].astype(np.float32) for i in range(3))
    chroma, sixths = value * saturation / 255, hue / 30
    image = np.empty_like(hsv)
    for channel, start in enumerate((5, 3, 1)):
        # Distance of the colour from the hue, in sixths of the circle.
        place = (start + sixths) % 6
        share = np.clip(np.minimum(place, 4 - place), 0, 1)
        image[..., channel] = np.round(value - chroma * share)
    return image

"""Colours of uint8 images: hue, saturation and value, and brighter or darker ones.

OpenCV is not needed for it: hue counts 180 steps here as there.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def linear(values: NDArray[np.uint8], factor: float, shift: float) -> NDArray[np.uint8]:
    """Multiplies and shifts values; they are cut to 0..255 and rounded down."""
    return np.clip(values.astype(np.float32) * factor + shift, 0, 255).astype(np.uint8)


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

"""A folder of labelled images of noise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

# Makes an image (H, W, 3) of uint8 from a generator and the number of its class.
Pixels = Callable[[np.random.Generator, int], np.ndarray]


def labelled_folder(
    root: Path,
    *,
    train: int = 8,
    val: int = 7,
    classes: int = 2,
    side: int = 20,
    pixels: Pixels | None = None,
    test_split: str = "val",
) -> Path:
    """Writes two splits with a folder for each class, which take turns; returns the root.

    Args:
        root: The folder of both.
        train: Images in train/.
        val: Images in the other split.
        classes: How many.
        side: Of the images, where `pixels` does not make them.
        pixels: Makes each image; None: all of it is noise, whatever the class.
        test_split: Name of the other split.
    """
    generator = np.random.default_rng(0)
    pixels = pixels or (lambda draw, label: noise(draw, side, side))
    for split, count in (("train", train), (test_split, val)):
        for number in range(count):
            label = number % classes
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels(generator, label)).save(folder / f"{number}.png")
    return root


def noise(generator: np.random.Generator, height: int, width: int, levels: int = 256) -> np.ndarray:
    """Draws an image (H, W, 3) of levels below so many."""
    return generator.integers(0, levels, (height, width, 3), dtype=np.uint8)

"""A folder of labelled images of noise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def labelled_folder(
    root: Path, *, train: int = 8, val: int = 7, classes: int = 2, side: int = 20
) -> Path:
    """Writes train/ and val/ with a folder for each class, in turn; returns the root."""
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            folder = root / split / "abcdefgh"[number % classes]
            folder.mkdir(parents=True, exist_ok=True)
            levels = generator.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(levels).save(folder / f"{number}.png")
    return root

"""Writes random images for gpu.sh and gpu_runs.sh.

    python benchmarks/gpu_images.py FOLDER COUNT [--dense]

FOLDER/images has images without labels. With --dense, FOLDER/coco and FOLDER/ade are datasets in
the layouts of COCO, with landscape and portrait images, and of ADE20K.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = map(str, (ROOT / "tests/support").iterdir())


def write_plain(folder: Path, count: int) -> None:
    """Writes images of smooth noise, 256 x 256 pixels.

    Args:
        folder: The folder, which is created.
        count: Number of images.
    """
    folder.mkdir(parents=True)
    draws = np.random.default_rng(0)
    for number in range(count):
        low = draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(low).resize((256, 256), Image.BICUBIC).save(folder / f"{number:03}.jpg")


def write_coco(root: Path, count: int) -> None:
    """Writes a dataset like COCO, of images with two objects, landscape and portrait in turns.

    Args:
        root: The folder.
        count: Number of images of each split.
    """
    from coco import annotation, write_set

    sizes = {number: ((64, 96), (96, 64))[number % 2] for number in range(1, count + 1)}
    for split in ("train", "val"):
        annotations = [
            annotation(
                2 * number + place, number, [6, 5 + 20 * place, 30, 24], category_id=category
            )
            for number in sizes
            for place, category in enumerate((3, 7))
        ]
        write_set(root, annotations, sizes=sizes, split=split)


def main(folder: Path, count: int, dense: bool) -> None:
    """Writes the datasets.

    Args:
        folder: The folder.
        count: Number of images without labels.
        dense: Whether to write the datasets like COCO and ADE20K, too.
    """
    write_plain(folder / "images" / "noise", count)
    if dense:
        from segmentation_twin import write_images

        write_coco(folder / "coco", 64)
        write_images(folder / "ade", 64)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "--dense" in sys.argv)

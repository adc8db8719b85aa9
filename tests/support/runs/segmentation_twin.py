"""The segmentation of SwinV2-G as a command, shrunken, and made images in ADE20K's layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from dense_runs import SMALL_GIANT, flags_of
from PIL import Image

FLAGS = f"""
{SMALL_GIANT}
--recipe ade20k_upernet_swinv2_giant
--task.segmentation.num_classes 4 --task.segmentation.head_width 16
--optim.warmup_epochs 0 --optim.base_lr 1e-2 --optim.warmup_lr 1e-3
"""
flags = flags_of(FLAGS)


def write_images(root: Path, count: int = 6, *, ignored: tuple[int, ...] = ()) -> Path:
    """Writes rectangles of four classes; some training images have no labelled pixel."""
    for split in ("training", "validation"):
        for number in range(count):
            image, labels = image_and_labels(number)
            if split == "training" and number in ignored:
                labels[:] = 0
            for kind, values, end in (("images", image, "jpg"), ("annotations", labels, "png")):
                folder = root / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(folder / f"{number:04d}.{end}", quality=95)
    names = "\n".join(
        f"{k}\t0.1\t1\t1\t{n}, other" for k, n in enumerate(("red", "green", "blue", "grey"), 1)
    )
    (root / "objectInfo150.txt").write_text(f"Idx\tRatio\tTrain\tVal\tName\n{names}\n")
    return root


def image_and_labels(number: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) and what its label file holds, (H, W): 0 is ignored, k + 1 is class k."""
    draw = np.random.default_rng(number)
    height, width = 72 + 8 * (number % 2), 64 + 16 * (number % 3)
    labels = np.full((height, width), 4, dtype=np.uint8)
    colors = np.array([[0, 0, 0], [220, 40, 40], [40, 200, 40], [40, 40, 220], [128, 128, 128]])
    for kind in (1, 2, 3):
        top, left = draw.integers(0, 36), draw.integers(0, 36)
        labels[top : top + 28, left : left + 28] = kind
    image = colors[labels] + draw.integers(-20, 20, (height, width, 1))
    labels[:4] = 0
    return np.clip(image, 0, 255).astype(np.uint8), labels

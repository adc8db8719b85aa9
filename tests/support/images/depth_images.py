"""Made images with depths, in the layouts of NYUv2 and KITTI with their lists, and in folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def image_and_depths(
    number: int, height: int = 72, width: int = 96
) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) of boxes before a wall, the darker the farther; their metres, (H, W).

    The borders and the right of every box have no depth.
    """
    draw = np.random.default_rng(number)
    depths = np.full((height, width), 4.0, dtype=np.float32)
    depths += np.linspace(0, 1, width, dtype=np.float32)
    unknown = np.zeros((height, width), bool)
    for metres in sorted(draw.uniform(1, 3.5, 4), reverse=True):
        top, left = draw.integers(0, height // 2), draw.integers(0, width // 2)
        rows, columns = slice(top, top + height // 3), slice(left, left + width // 3)
        depths[rows, columns], unknown[rows, columns] = metres, False
        unknown[rows, left + width // 3 : left + width // 3 + 3] = True
    unknown[:3] = unknown[:, :2] = True
    tint = np.array([1.0, 0.9, 0.7]) * (260 - 45 * depths[..., None])
    image = np.clip(tint + draw.normal(0, 4, (height, width, 1)), 0, 255).astype(np.uint8)
    return image, np.where(unknown, np.float32(0), depths)


def save(image: np.ndarray, depths: np.ndarray, paths: tuple[Path, Path], scale: float) -> None:
    """Writes an image, and its depths as a PNG of 16 bits."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(paths[0], quality=95)
    Image.fromarray(np.rint(depths * scale).astype(np.uint16)).save(paths[1])


def write_images(root: Path, count: int = 6, *, without: tuple[int, ...] = ()) -> Path:
    """Writes NYUv2's layout: scenes below, official_splits/test, train_list.txt, test_list.txt.

    Args:
        root: A folder, made if it is missing.
        count: Images of each split.
        without: Training images without any depth.
    """
    for split, start in (("train", ""), ("test", "official_splits/test")):
        lines = []
        for number in range(count):
            scene = f"{('kitchen', 'office')[number % 2]}{'_0001a' if split == 'train' else ''}"
            names = (f"{scene}/rgb_{number:05d}.jpg", f"{scene}/sync_depth_{number:05d}.png")
            image, depths = image_and_depths(number + (0 if split == "train" else 100))
            if split == "train" and number in without:
                depths = 0 * depths
            save(image, depths, tuple(root / start / name for name in names), 1000)
            lines.append(" ".join(f"/{name}" for name in names) + " 518.8579")
        (root / f"{split}_list.txt").write_text("\n".join(lines) + "\n")
    return root


def write_kitti(root: Path, count: int = 4) -> Path:
    """Writes KITTI's layout with its lists; the second test image has no truth."""
    for split, folder in (("train", "train"), ("test", "val")):
        lines = []
        for number in range(count):
            drive = f"2011_09_26_drive_{number % 2:04d}_sync"
            names = (
                f"raw_data/2011_09_26/{drive}/image_02/data/{number:010d}.png",
                f"data_depth_annotated/{folder}/{drive}/proj_depth/groundtruth/image_02/"
                f"{number:010d}.png",
            )
            image, depths = image_and_depths(number, 75, 250)
            save(image, depths, tuple(root / name for name in names), 256)
            last = "None" if split == "test" and number == 1 else f"/{names[1]}"
            lines.append(f"/{names[0]} {last} 721.5377")
        (root / f"{split}_list.txt").write_text("\n".join(lines) + "\n")
    return root

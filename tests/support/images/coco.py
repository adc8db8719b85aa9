"""COCO for tests: the real coco_tiny of FD_DATA, and small sets made here."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[3]
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}, {"id": 90, "name": "brush"}]


def unpack_coco_tiny(folder: Path) -> Path:
    """Unpacks coco_tiny into a folder and returns it; skips the test where there is none."""
    data = Path(os.environ.get("FD_DATA", REPOSITORY / ".." / "shared" / "data"))
    if not (data / "coco_tiny.tar").is_file():
        pytest.skip("FD_DATA has no coco_tiny.tar")
    with tarfile.open(data / "coco_tiny.tar") as archive:
        archive.extractall(folder, filter="data")
    return folder


def square(left: float, top: float, side: float) -> list[list[float]]:
    """A square as COCO's polygons."""
    right, bottom = left + side, top + side
    return [[left, top, right, top, right, bottom, left, bottom]]


def annotation(number: int, image: int, box: list[float], **changes: Any) -> dict[str, Any]:
    """An annotation of a cat, whose mask is its box."""
    left, top, width, height = box
    right, bottom = left + width, top + height
    return {
        "id": number,
        "image_id": image,
        "category_id": 3,
        "bbox": box,
        "area": width * height,
        "iscrowd": 0,
        "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
    } | changes


def write_set(
    root: Path,
    annotations: list[dict[str, Any]],
    *,
    sizes: dict[int, tuple[int, int]],
    split: str = "train",
    missing: tuple[int, ...] = (),
) -> Path:
    """Writes a set in COCO's own layout: images (height, width) by id, and their JSON."""
    folder = root / f"{split}2017"
    folder.mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for number, (height, width) in sizes.items():
        if number not in missing:
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number:012}.png")
    images = [
        {"id": number, "file_name": f"{number:012}.png", "height": height, "width": width}
        for number, (height, width) in sizes.items()
    ]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root

"""Reads the CIFAR-10 archives of FD_DATA; used by tests and benchmarks."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image


def read_cifar(path: Path, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Returns the first images (N, 32, 32, 3) uint8 of an archive, their labels and class names."""
    with tarfile.open(path) as archive:
        # A hundred images in each.
        strips = sorted(m.name for m in archive if m.name.endswith(".webp"))[: -(-count // 100)]
        pixels = [np.asarray(Image.open(archive.extractfile(name))) for name in strips]
        labels = np.load(io.BytesIO(archive.extractfile("labels.npy").read()))
        classes = json.loads(archive.extractfile("meta.json").read())["classes"]
    return np.concatenate(pixels).reshape(-1, 32, 32, 3)[:count], labels[:count], classes

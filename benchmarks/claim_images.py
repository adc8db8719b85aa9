"""The CIFAR-10 images of claim.py, named by the hash of their pixels.

They come from the archives of FD_DATA or from the official archive (cifar-10-python.tar.gz or
cifar-10-binary.tar.gz): of the latter, the 20,000 training images that the former holds, which a
stored list of hashes names. A name says nothing of where an image came from, so both give the same
folders, and the same order of images in them.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import RESULTS, ROOT
from PIL import Image

sys.path[:0] = [str(ROOT), *map(str, (ROOT / "tests/support").iterdir())]

from cifar import read_cifar  # noqa: E402

ARCHIVES = {"train": "cifar10_train20k.tar", "test": "cifar10_test10k.tar"}
LIST = RESULTS / "claim" / "images.npy"
"""The first five bytes of the hash of each of the 20,000 training images, (20000, 5) uint8."""
HELD_OUT = "held_out_"
"""Begins the names of those images of the test folder that choose the learning rates."""

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Images(NamedTuple):
    """Images of one split.

    Attributes:
        pixels: (N, 32, 32, 3) uint8.
        labels: (N,), places in `CLASSES`.
    """

    pixels: np.ndarray
    labels: np.ndarray

    def names(self) -> list[str]:
        """Returns the SHA-256 of each image's pixels, by row, column and channel, in hex."""
        return [hashlib.sha256(image.tobytes()).hexdigest() for image in self.pixels]


class Counts(NamedTuple):
    """Numbers of images: without labels, and of each kind with labels."""

    unlabelled: int
    labelled: int
    held_out: int
    test: int


def write_images(source: Path, folder: Path, counts: Counts, *, listed: Path = LIST) -> None:
    """Writes unlabelled/, and labelled/ with train/ and test/, each with class folders.

    Without labels are the first images by name; with labels the first of each class, then those
    held out. Held-out images and test images are tested together, so that a rate is chosen without
    a second training; `HELD_OUT` tells them apart.

    Args:
        source: The folder of FD_DATA, or the official archive.
        folder: Is made.
        counts: How many of each.
        listed: The list of training images.
    """
    train, test = read(source, listed)
    names, tested = train.names(), test.names()
    for place in np.argsort(names)[: counts.unlabelled]:
        _save(train.pixels[place], folder / "unlabelled" / f"{names[place]}.png")
    for number, name in enumerate(CLASSES):
        order = [place for place in np.argsort(names) if train.labels[place] == number]
        chosen, beside = counts.labelled // 10, counts.held_out // 10
        for place in order[:chosen]:
            _save(train.pixels[place], folder / "labelled/train" / name / f"{names[place]}.png")
        place_of_tests = folder / "labelled/test" / name
        for place in order[chosen : chosen + beside]:
            _save(train.pixels[place], place_of_tests / f"{HELD_OUT}{names[place]}.png")
        order = [place for place in np.argsort(tested) if test.labels[place] == number]
        for place in order[: counts.test // 10]:
            _save(test.pixels[place], place_of_tests / f"{tested[place]}.png")


def read(source: Path, listed: Path = LIST) -> tuple[Images, Images]:
    """Returns the listed training images and all test images."""
    if source.is_dir():
        train, test = (
            Images(*read_cifar(source / name, count)[:2])
            for name, count in zip(ARCHIVES.values(), (20_000, 10_000), strict=True)
        )
    else:
        train, test = (_official(source, word) for word in ("data_batch", "test_batch"))
    hashes = {bytes(row) for row in np.load(listed)}
    is_listed = np.array([bytes.fromhex(name[:10]) in hashes for name in train.names()])
    if is_listed.sum() != len(hashes):
        sys.exit(f"{source}: {is_listed.sum()} of the {len(hashes)} training images of {listed}")
    return Images(train.pixels[is_listed], train.labels[is_listed]), test


def is_held_out(folder: Path) -> np.ndarray:
    """Returns (N,), whether each image of labelled/test is held out, in the order of a test."""
    root = folder / "labelled/test"
    paths = sorted(path.relative_to(root).as_posix().encode() for path in root.glob("*/*.png"))
    return np.array([f"/{HELD_OUT}".encode() in path for path in paths])


def _official(archive: Path, word: str) -> Images:
    """Reads the batches of a split from the official archive, in either of its two forms."""
    pixels, labels = [], []
    with tarfile.open(archive) as members:
        for member in sorted(members.getmembers(), key=lambda member: member.name):
            if not (member.isfile() and Path(member.name).name.startswith(word)):
                continue
            batch = members.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".bin"):
                rows = np.frombuffer(batch, np.uint8).reshape(-1, 3073)
                pixels.append(rows[:, 1:])
                labels.append(rows[:, 0])
            else:
                arrays = _Arrays(io.BytesIO(batch), encoding="bytes").load()
                pixels.append(arrays[b"data"])
                labels.append(np.array(arrays[b"labels"]))
    if not pixels:
        sys.exit(f"{archive}: no {word}; expected CIFAR-10's official archive, python or binary")
    planes = np.concatenate(pixels).reshape(-1, 3, 32, 32)
    return Images(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.concatenate(labels))


class _Arrays(pickle.Unpickler):
    """Reads plain values and arrays, and runs nothing else that a file names."""

    _ALLOWED = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer", "encode")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}: neither a plain value nor an array")


def _save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)

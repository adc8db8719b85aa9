"""Writes the CIFAR-10 images of claim.py, each named by the hash of its pixels.

The images come from the archives of FD_DATA, or from the official archive (cifar-10-python.tar.gz
or cifar-10-binary.tar.gz). FD_DATA has 20,000 of the training images, and a stored list of their
hashes selects the same images in the official archive. Since names depend on pixels alone, both
sources give the same folders, with the images in the same order.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from harness import ROOT
from PIL import Image

sys.path[:0] = [str(ROOT), *map(str, (ROOT / "tests/support").iterdir())]

from cifar import read_cifar  # noqa: E402

ARCHIVES = {"train": "cifar10_train20k.tar", "test": "cifar10_test10k.tar"}
LIST = ROOT / "benchmarks/results/claim/images.npy"
"""File with the first five bytes of the hash of each training image, (20000, 5) uint8."""
HELD_OUT = "held_out_"
"""Prefix of the names of those images in the test folder by which learning rates are chosen."""

UNREADABLE = (
    *(OSError, EOFError, LookupError, TypeError, ValueError),
    *(pickle.UnpicklingError, tarfile.TarError, zlib.error),
)
"""Errors of the readers of an archive that is damaged, or is something else."""
REMEDY = "Name by --data FD_DATA's folder, cifar-10-python.tar.gz or cifar-10-binary.tar.gz."

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Images(NamedTuple):
    """Images of one split of CIFAR-10.

    Attributes:
        pixels: The images, (N, 32, 32, 3) uint8.
        labels: Index of each image's class in `CLASSES`, (N,).
    """

    pixels: np.ndarray
    labels: np.ndarray

    def names(self) -> list[str]:
        """Returns the SHA-256 of each image's pixels in hex; pixels are in the order (H, W, C)."""
        return [hashlib.sha256(image.tobytes()).hexdigest() for image in self.pixels]


class Counts(NamedTuple):
    """Numbers of images: unlabelled, for fine-tuning, for choosing the rate, and for tests."""

    unlabelled: int
    labelled: int
    held_out: int
    test: int


def write_images(source: Path, folder: Path, counts: Counts, *, listed: Path = LIST) -> None:
    """Writes unlabelled/, and labelled/ with train/ and test/, which have class folders.

    The unlabelled images are the first training images by name. Of each class, the first images by
    name are for fine-tuning, and the next ones are held out to choose the learning rate. Held-out
    images are written to test/ with the prefix `HELD_OUT`, so that one training tests them and the
    test images together.

    Args:
        source: The folder of FD_DATA, or the official archive.
        folder: The folder to write to, which is created.
        counts: Number of images of each kind.
        listed: File with the list of training images.

    Raises: SystemExit: if the source has too few images.
    """
    train, test = read(source, listed)
    for split, images, count in (
        ("training", train, counts.labelled + counts.held_out),
        ("test", test, counts.test),
    ):
        fewest = np.bincount(images.labels, minlength=len(CLASSES)).min()
        if fewest < count // len(CLASSES):
            sys.exit(
                f"{source}: too few {split} images of a class; got {fewest}, "
                f"expected {count // len(CLASSES)}. {REMEDY}"
            )
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
    """Returns the training images in the list, and all test images.

    Args:
        source: The folder of FD_DATA, or the official archive.
        listed: File with the hashes of the training images to use.

    Raises: SystemExit: if the source is not one of the two, or a listed image is missing.
    """
    try:
        if source.is_dir():
            train, test = (
                Images(*read_cifar(source / name, count)[:2])
                for name, count in zip(ARCHIVES.values(), (20_000, 10_000), strict=True)
            )
        else:
            train, test = (_official(source, word) for word in ("data_batch", "test_batch"))
    except UNREADABLE as error:
        # The first line: of a file that is no archive, more lines tell what each reader said.
        reason = str(error).partition(":\n")[0]
        sys.exit(f"{source}: not read as CIFAR-10: {reason}. {REMEDY}")
    hashes = {bytes(row) for row in np.load(listed)}
    is_listed = np.array([bytes.fromhex(name[:10]) in hashes for name in train.names()])
    if is_listed.sum() != len(hashes):
        sys.exit(
            f"{source}: training images that {listed} lists are missing; got {is_listed.sum()}, "
            f"expected {len(hashes)}. {REMEDY}"
        )
    return Images(train.pixels[is_listed], train.labels[is_listed]), test


def is_held_out(folder: Path) -> np.ndarray:
    """Returns for each image of labelled/test whether the image is held out, (N,) bool.

    The images are in the order of their paths, as in the predictions of a test.

    Args:
        folder: The folder that `write_images` wrote.
    """
    root = folder / "labelled/test"
    paths = sorted(path.relative_to(root).as_posix().encode() for path in root.glob("*/*.png"))
    return np.array([f"/{HELD_OUT}".encode() in path for path in paths])


def _official(archive: Path, word: str) -> Images:
    """Returns the images of a split from the official archive, in its Python or binary form.

    Args:
        archive: The archive.
        word: Beginning of the split's file names, such as "data_batch".
    """
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
        raise LookupError(f"no {word}")
    planes = np.concatenate(pixels).reshape(-1, 3, 32, 32)
    return Images(np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), np.concatenate(labels))


class _Arrays(pickle.Unpickler):
    """Unpickler that reads plain values and NumPy arrays only, and refuses any other code."""

    _ALLOWED = ("_reconstruct", "ndarray", "dtype", "scalar", "_frombuffer", "encode")

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self._ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name}: neither a plain value nor an array")


def _save(image: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)

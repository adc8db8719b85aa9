"""Labelled images: class folders, tar shards with a label beside each image, or another source."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fd_large.data.custom import is_custom, open_custom
from fd_large.data.sampler import Blocks
from fd_large.data.source import ImageSource, open_images
from fd_large.errors import DataError

log = logging.getLogger(__name__)

# Where a dataset's parts lie under its root.
SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}


@dataclass(frozen=True)
class LabelledImages:
    """Images of which each belongs to one class; itself an `ImageSource`.

    Attributes:
        images: The images.
        labels: (num_images,) int64, the class of each.
        classes: Names of the classes; a label is a place in it.
    """

    images: ImageSource
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """A hash of the samples' names in order."""
        return self.images.fingerprint

    @property
    def blocks(self) -> Blocks | None:
        """The blocks of images that are read in blocks."""
        return getattr(self.images, "blocks", None)

    def expect(self, numbers: Sequence[int]) -> None:
        """Tells such images which blocks are needed next."""
        self.images.expect(numbers)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        return self.images[index]

    def read(self, index: int) -> bytes | bytearray:
        """The bytes of image `index`; DataError if they cannot be read."""
        return self.images.read(index)

    def label(self, index: int) -> int:
        """The class of image `index`."""
        return int(self.labels[index])


def training_part(root: str, *, where: str = "data.root") -> str:
    """Returns the folder to learn from: `train/` where a root has that beside what is tested.

    Args:
        root: As `open_images` takes it.
        where: The field that names it, for the log.
    """
    train = os.path.join(root, *SPLITS["train"])
    tested = [f"{name}/" for name in SPLITS["val"] if os.path.isdir(os.path.join(root, name))]
    if not (tested and os.path.isdir(train)):
        return root
    log.info("%s: %s; %s beside it stays out of training", where, train, " and ".join(tested))
    return train


def open_labelled(
    root: str,
    classes: Sequence[str] | None = None,
    *,
    part: str = "",
    where: str = "data.root",
) -> LabelledImages:
    """Opens a dataset whose source knows labels.

    Args:
        root: As `open_images` takes it.
        classes: Names of the training set's classes, for a set that is tested; None: those found.
        part: The part of a source of the user's own, "train" or "val"; "": all.
        where: The field that names it, for messages.

    Raises: DataError: if there is nothing of the kind, an image has no label, or a class is not
        among those of the training set.
    """
    images = open_custom(root, where=where, part=part) or open_images(root, where=where)
    if not hasattr(images, "labels"):
        raise DataError(
            f"{where}: images without labels; got {root!r}, expected class folders or tar "
            "shards with labels. Name such a folder."
        )
    labels, names = images.labels()
    if names is None:
        names = tuple(map(str, range(int(labels.max()) + 1)))
        unknown = [] if classes is None else names[len(classes) :]
    else:
        numbers = {name: number for number, name in enumerate(classes or names)}
        unknown = [name for name in names if name not in numbers]
        labels = np.array([numbers.get(name, -1) for name in names])[labels]
    if unknown:
        raise DataError(
            f"{where}: classes that training does not know; got {', '.join(unknown[-5:])} in "
            f"{root!r}, expected those of the training set. Name the folders alike, or use shards "
            "of the same classes."
        )
    return LabelledImages(images, labels, names if classes is None else tuple(classes))


def open_split(
    root: str, split: str, classes: Sequence[str] | None = None, *, where: str = "data.root"
) -> LabelledImages:
    """Opens the training or the test part of a dataset: `train/`, and `val/` or `test/`.

    Args:
        root: The folder that holds the parts, or a source of the user's own that has them.
        split: "train" or "val".
        classes: Names of the training set's classes, for a set that is tested.
        where: The field that names the folder, for messages.

    Raises: DataError: if the folder lacks the part, or there is only one class.
    """
    folders = [os.path.join(root, name) for name in SPLITS[split]]
    for folder in [root] if is_custom(root) else filter(os.path.isdir, folders):
        found = open_labelled(folder, classes, part=split, where=where)
        if len(found.classes) < 2:
            raise DataError(
                f"{where}: one class; got {', '.join(found.classes)} alone in {folder!r}, "
                "expected several, a folder for each. Add the others."
            )
        return found
    expected = " or ".join(f"{name}/" for name in SPLITS[split])
    raise DataError(
        f"{where}: no part {expected} in the folder; got {root!r}, expected train/ and val/ or "
        f"test/, each with class folders or labelled tar shards. Set --{where} FOLDER."
    )

"""Labelled images: class folders, or tar shards with a label beside each image.

A label is a further method of an image source, by the same number. Shards follow webdataset: the
members KEY.jpg and KEY.cls belong together, KEY being the name up to the first dot after the last
slash, and KEY.cls holds the label as a decimal number.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fd_large.data.folder import EXTENSIONS, ImageFolder
from fd_large.data.listing import Listing, ListingWriter, listed, settled
from fd_large.data.shards import TarShards
from fd_large.data.source import ImageSource, open_images
from fd_large.data.tar_index import Torn, members
from fd_large.errors import DataError

# Where a data set's parts lie under its root.
SPLITS = {"train": ("train",), "val": ("val", "test")}

_ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)
_LABEL = b".cls"
# A label is a decimal number; what is longer is none.
_MAX_LABEL_BYTES = 32


class LabelledImages(ImageSource, Protocol):
    """Images of which each belongs to one class.

    Attributes:
        classes: Their names; a label is a place in it.
    """

    classes: tuple[str, ...]

    def label(self, index: int) -> int:
        """The class of image `index`."""


class ClassFolders(ImageFolder):
    """A folder with a sub folder for each class, images anywhere below it.

    Classes are in the order of their names, as torchvision's ImageFolder has them. Nothing as long
    as the data set is held: the listing is sorted, so the images of a class are neighbours.
    """

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str] | None = None,
        *,
        where: str = "data.root",
    ) -> None:
        """Lists the folder.

        Args:
            root: The folder.
            classes: Names that count as classes, those of the training set; None: those found.
            where: The field that names the folder, for messages.

        Raises: DataError: if an image lies in no class, or in one that is not among the names.
        """
        super().__init__(root, where=where)
        starts, names = [0], []
        while starts[-1] < len(self):
            first, slash, _ = self._listing.name(starts[-1]).partition(b"/")
            if not slash:
                raise DataError(
                    f"{where}: an image in no class; got {self[starts[-1]]!r}, expected a sub "
                    "folder for each class. Move it into the folder of its class."
                )
            names.append(os.fsdecode(first))
            # "0" follows "/": the first name that is no longer below this folder.
            end = bisect_left(_Names(self._listing), first + b"0", lo=starts[-1])
            starts.append(end)
        self.classes = tuple(classes) if classes is not None else tuple(sorted(names))
        number = {name: place for place, name in enumerate(self.classes)}
        if unknown := [name for name in names if name not in number]:
            raise DataError(
                f"{where}: classes that training does not know; got {', '.join(unknown[:5])} in "
                f"{self.root!r}, expected those of the training set. Name the folders alike."
            )
        self._starts = np.array(starts[1:])
        self._labels = [number[name] for name in names]

    def label(self, index: int) -> int:
        """The class of image `index`."""
        return self._labels[int(np.searchsorted(self._starts, index, side="right"))]


class LabelledShards(TarShards):
    """Tar shards in which KEY.cls stands beside KEY.jpg (webdataset)."""

    def __init__(
        self,
        paths: Sequence[str],
        classes: Sequence[str] | None = None,
        *,
        where: str = "data.root",
    ) -> None:
        """Indexes images and labels.

        Args:
            paths: The tar files.
            classes: Those of the training set; None: numbers up to the largest label.
            where: The field that names the files, for messages.

        Raises: DataError: if an image has no label, or one that training does not know.
        """
        super().__init__(paths, where=where)
        key = "\n".join(os.path.realpath(path) for path in self.paths)
        self._labels: Listing = listed(
            f"labels {key}",
            columns=("label",),
            fill=self._fill_labels,
            is_current=self._labels_are_current,
        )
        if self._labels.fingerprint != self.fingerprint:
            raise DataError(
                f"{where}: shards changed while they were indexed; got another list of images "
                f"in {self.paths[0]} and the others, expected the same. Start again once they no "
                "longer change."
            )
        largest = int(self._labels.facts["largest"])
        self.classes = (
            tuple(classes) if classes is not None else tuple(map(str, range(largest + 1)))
        )
        if largest >= len(self.classes):
            raise DataError(
                f"{where}: a label that training does not know; got {largest} in "
                f"{self.paths[0]} or the others, expected 0 to {len(self.classes) - 1}. Use shards "
                "of the same classes."
            )

    def label(self, index: int) -> int:
        """The class of image `index`."""
        return self._labels.number("label", index)

    def _fill_labels(self, writer: ListingWriter) -> dict[str, Any]:
        # In the order of the images: by name, then shard, then place.
        found: list[tuple[bytes, int, int, int]] = []
        for number, path in enumerate(self.paths):
            found += self._labels_of(number, path)
        found.sort()
        for name, _, _, label in found:
            writer.add(name, label)
        largest = max((label for *_, label in found), default=-1)
        return {"largest": largest, "shards": self.sizes_and_times}

    def _labels_of(self, number: int, path: str) -> list[tuple[bytes, int, int, int]]:
        labels: dict[bytes, int] = {}
        pictures: list[tuple[bytes, int]] = []
        with open(path, "rb", buffering=0) as file:
            try:
                for name, offset, size in members(file.fileno()):
                    if name.startswith(b".") or b"/." in name:
                        continue
                    if name.endswith(_LABEL):
                        text = os.pread(file.fileno(), min(size, _MAX_LABEL_BYTES), offset)
                        labels[_key(name)] = _number(text, path, name, self._where)
                    elif name.lower().endswith(_ENDINGS):
                        pictures.append((name, offset))
            except Torn:
                pass  # The index of the images has told it.
        without = [name for name, _ in pictures if _key(name) not in labels]
        if without:
            raise DataError(
                f"{self._where}: images without a label; got {len(without)} in {path}, the first "
                f"{os.fsdecode(without[0])}, expected KEY.cls beside each KEY.jpg. Write the "
                "shards with labels, or use class folders."
            )
        return [(name, number, offset, labels[_key(name)]) for name, offset in pictures]

    def _labels_are_current(self, facts: dict[str, Any]) -> bool:
        return facts["shards"] == self.sizes_and_times and all(
            settled(modified, facts["listed_at"]) for _, modified in self.sizes_and_times
        )


def open_labelled(
    root: str, classes: Sequence[str] | None = None, *, where: str = "data.root"
) -> LabelledImages:
    """Class folders, or tar shards, as `open_images` finds them.

    Args:
        root: A folder of class folders; tar files by their folder, one file or a pattern.
        classes: Those of the training set, for a set that is tested.
        where: The field that names it, for messages.

    Raises: DataError: if there is nothing of the kind.
    """
    pictures = open_images(root, where=where)
    if isinstance(pictures, TarShards):
        return LabelledShards(pictures.paths, classes, where=where)
    if not isinstance(pictures, ImageFolder):
        raise DataError(
            f"{where}: images without labels; got {root!r}, expected class folders or tar "
            "shards with labels. Name such a folder."
        )
    return ClassFolders(root, classes, where=where)


def open_split(
    root: str, split: str, classes: Sequence[str] | None = None, *, where: str = "data.root"
) -> LabelledImages:
    """The training or the test part of a data set: `train/`, and `val/` or `test/`, in its folder.

    Args:
        root: The folder that holds the parts.
        split: "train" or "val".
        classes: Those of the training set, for a set that is tested.
        where: The field that names the folder, for messages.

    Raises: DataError: if the folder lacks the part, or there is nothing to tell apart.
    """
    for name in SPLITS[split]:
        folder = os.path.join(root, name)
        if os.path.isdir(folder):
            found = open_labelled(folder, classes, where=where)
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


class _Names(Sequence[bytes]):
    """The names of a listing, for a search in their order."""

    def __init__(self, listing: Listing) -> None:
        self._listing = listing

    def __len__(self) -> int:
        return len(self._listing)

    def __getitem__(self, index: int) -> bytes:  # type: ignore[override]
        return self._listing.name(index)


def _key(name: bytes) -> bytes:
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.partition(b".")[0]


def _number(text: bytes, path: str, name: bytes, where: str) -> int:
    try:
        label = int(text)
    except ValueError:
        label = -1
    if label < 0:
        raise DataError(
            f"{where}: a label that is no class; got {text[:20]!r} in {os.fsdecode(name)} of "
            f"{path}, expected a whole number from 0 up. Write the shard again."
        )
    return label

"""Opens labelled images and the training or test part of a dataset.

Labels come from class folders, from tar shards with labels, or from another source with labels. In
all functions, `root` is a dataset as in `open_images`, and `where` is the configuration field that
holds the root, for messages.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fd_large.data.balanced import open_balanced
from fd_large.data.custom import is_custom, open_custom
from fd_large.data.objects import find_objects, join
from fd_large.data.roots import PARQUET, is_url, listed, local_kind
from fd_large.data.sampler import Blocks
from fd_large.data.source import ImageSource, open_images
from fd_large.data.val_fraction import FIELD, Part, places_of
from fd_large.errors import DataError

log = logging.getLogger(__name__)

_FILES = (PARQUET, ".tar")
# Where a dataset's parts lie under its root.
SPLITS = {"train": ("train",), "val": ("val", "validation", "test")}


@dataclass(frozen=True)
class LabelledImages:
    """`ImageSource` with a class for each image.

    Attributes:
        images: The images.
        labels: (num_images,) int64, the class of each image as an index into `classes`.
        classes: Names of the classes.
    """

    images: ImageSource
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of `images`, a hash of the samples."""
        return self.images.fingerprint

    @property
    def blocks(self) -> Blocks | None:
        """The blocks of `images`, or None if this source is not read in blocks."""
        return getattr(self.images, "blocks", None)

    def expect(self, numbers: Sequence[int]) -> None:
        """Starts to fetch the blocks with these numbers; only for images that are read in blocks.

        The numbers are in the order in which the blocks are needed.
        """
        self.images.expect(numbers)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> str:
        return self.images[index]

    def read(self, index: int) -> bytes | bytearray:
        """Returns the bytes of image `index`; raises DataError if the image cannot be read."""
        return self.images.read(index)

    def label(self, index: int) -> int:
        """Returns the class of image `index`, as an index into `classes`."""
        return int(self.labels[index])


def training_part(root: str, *, where: str = "data.root") -> str:
    """Returns the root of the part `train` if the dataset has it and a test part, else `root`."""
    train, tested = _places(root, "train", where), _places(root, "val", where)
    if not (tested and train):
        return root
    names = [place[len(root) :].strip("/") for place in tested]
    beside = " and ".join(name if name.endswith(_FILES) else f"{name}/" for name in names)
    log.info("%s: training uses %s, and not %s next to it", where, train[0], beside)
    return train[0]


def evaluation_part(root: str) -> str:
    """Returns the root of the test part if the dataset has it and a part `train`, else `root`."""
    where = "data.root"
    tested = _places(root, "val", where)
    return tested[0] if tested and _places(root, "train", where) else root


def open_training(root: str, *, val_fraction: float = 0.0, where: str = "data.root") -> ImageSource:
    """Opens the training images of a dataset, without labels.

    Args:
        val_fraction: Fraction of the images of a folder without parts that is left out for tests; 0
            to leave out none.

    Raises: DataError: if the dataset cannot be used.
    """
    balanced = open_balanced(
        root, where, lambda part, name: open_training(part, val_fraction=val_fraction, where=name)
    )
    if balanced is not None:
        return balanced
    if not val_fraction:
        return open_images(training_part(root, where=where), where=where)
    return _part(root, "train", val_fraction, where)


def open_held_out(root: str, val_fraction: float, *, where: str) -> ImageSource:
    """Opens the images of a folder that `open_training` leaves out for tests, without labels.

    The folder has no parts, and `val_fraction` is as given to `open_training`.

    Raises: DataError: if the folder cannot be used, or has the parts `train` and `val` or `test`.
    """
    return _part(root, "val", val_fraction, where)


def _part(root: str, part: str, val_fraction: float, where: str) -> ImageSource:
    _check_no_parts(root, where)
    images = open_images(root, where=where)
    return Part(images, places_of(images, part, val_fraction, where=where))


def has_parts(root: str, *, where: str = "data.root") -> bool:
    """Whether a dataset has a part `train` and a test part (`val`, `validation` or `test`)."""
    return all(_places(root, split, where) for split in SPLITS)


def _check_no_parts(root: str, where: str) -> None:
    if has_parts(root, where=where):
        raise DataError(
            f"{FIELD}: the folder already has parts; got {root!r} with train/ and val/ or "
            f"test/, expected class folders alone. Leave out --{FIELD}, or set --{where} to one "
            "of its parts."
        )


def open_labelled(
    root: str,
    classes: Sequence[str] | None = None,
    *,
    part: str = "",
    where: str = "data.root",
) -> LabelledImages:
    """Opens a dataset with labels.

    Args:
        classes: Names of the classes by which labels are numbered: for a test set, the classes of
            the training set. None for the classes of the dataset itself.
        part: Part of a user's own source to open, "train" or "val"; "" for all images. Other
            sources ignore it.

    Raises: DataError: if the dataset does not exist, if the dataset or an image in it has no label,
        or if `classes` lacks a class of the dataset.
    """
    images = open_custom(root, where=where, part=part) or open_images(root, where=where)
    if not hasattr(images, "labels"):
        raise DataError(
            f"{where}: images without labels; got {root!r}, expected class folders, tar "
            "shards with labels, or a table with a column of classes. Name such a dataset."
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
            f"{where}: classes that are not in the training set; got {', '.join(unknown[-5:])} in "
            f"{root!r}, expected only classes of the training set. Give the folders the same "
            "names, or use shards with the same classes."
        )
    return LabelledImages(images, labels, names if classes is None else tuple(classes))


def open_split(
    root: str,
    split: str,
    classes: Sequence[str] | None = None,
    *,
    val_fraction: float = 0.0,
    where: str = "data.root",
) -> LabelledImages:
    """Opens the training part or the test part of a labelled dataset.

    The training part is `train`, and the test part is `val`, `validation` or `test`.

    Args:
        root: The folder or URL of a dataset with both parts, a user's own source with both parts,
            or, if `val_fraction` is not 0, a folder of class folders.
        split: "train" or "val".
        classes: As in `open_labelled`.
        val_fraction: Fraction of the images that make the test part of a folder without parts; the
            names of the files decide which images these are. 0 for a dataset with parts.

    Raises: DataError: if the dataset lacks the part, or has a single class.
    """
    if val_fraction:
        _check_no_parts(root, where)
        images = open_labelled(root, classes, where=where)
        _check_classes(images, root, where)
        places = places_of(images.images, split, val_fraction, where=where)
        labels = images.labels[places]
        if split == "train" and (missing := set(range(len(images.classes))) - {*labels.tolist()}):
            names = ", ".join(images.classes[number] for number in sorted(missing)[:5])
            log.warning(
                "%s: all images of %d classes are held out (%s): these classes have no training "
                "images",
                FIELD,
                len(missing),
                names,
            )
        return LabelledImages(Part(images.images, places), labels, images.classes)
    for folder in [root] if is_custom(root) else _places(root, split, where):
        images = open_labelled(folder, classes, part=split, where=where)
        _check_classes(images, folder, where)
        return images
    expected = " or ".join(f"{name}/" for name in SPLITS[split])
    raise DataError(
        f"{where}: no part {expected} in the folder; got {root!r}, expected train/ and val/ or "
        "test/, each with class folders or labelled tar shards, or parquet files of these names. "
        f"Set --{where} FOLDER, or for class folders without parts --{FIELD} 0.1."
    )


def _places(root: str, split: str, where: str) -> list[str]:
    """Returns the places of the part "train" or "val" of a dataset, as roots for `open_images`.

    A place is a folder or URL below the dataset's root, or a pattern of files whose names begin
    with the name of the part, such as "train-00000-of-00002.parquet". There may be several places,
    since the test part may be named `val`, `validation` or `test`; callers open the first. There is
    none if the part is missing.
    """
    if is_url(root):
        start = root.rstrip("/") + "/"
        urls = [stored.url for stored in find_objects(root, where)]
        files = [url[len(start) :] for url in urls if url.startswith(start)]
        folders = {file.partition("/")[0] for file in files if "/" in file}
    elif local_kind(root, where=where) != "folder":
        return []
    else:
        names = listed(root, where)
        files = [name for name in names if name.endswith(PARQUET)]
        if local_kind(root, "data", where=where) == "folder":
            inside = listed(os.path.join(root, "data"), where)
            files += [f"data/{name}" for name in inside if name.endswith(PARQUET)]
        folders = {n for n in SPLITS[split] if local_kind(root, n, where=where) == "folder"}
    places = []
    for name in SPLITS[split]:
        if name in folders:
            places.append(join(root, name))
            continue
        for file in files:
            folder, slash, last = file.rpartition("/")
            if last.startswith(name) and last[len(name) : len(name) + 1] in ("-", "_", "."):
                pattern = f"{name}{last[len(name)]}*{os.path.splitext(last)[1]}"
                places.append(join(root, f"{folder}{slash}{pattern.replace('.*.', '.')}"))
                break
    return places


def _check_classes(images: LabelledImages, folder: str, where: str) -> None:
    if len(images.classes) < 2:
        raise DataError(
            f"{where}: a single class; got {', '.join(images.classes)} in {folder!r}, expected "
            "several classes, a folder for each. Add the other classes."
        )

"""Datasets in COCO's layout: folders of images, and a JSON file of objects for each split."""

from __future__ import annotations

import logging
import os
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fd_large.data.folder import paths_below, read_image
from fd_large.data.listing import Listing, Made, listed, settled
from fd_large.data.val_fraction import DivisibleImages
from fd_large.errors import DataError
from fd_large.files import kind_of
from fd_large.tasks.dense.geometry import whole_view
from fd_large.tasks.dense.pairs import read_numbers
from fd_large.tasks.detection.data.masks import coco_masks
from fd_large.tasks.detection.data.objects import (
    NO_FILE,
    Findings,
    ImageObjects,
    read_objects,
)
from fd_large.tasks.detection.data.target import UNLABELLED, Target, make_target

log = logging.getLogger(__name__)

LAYOUTS = (
    # COCO's own
    ("annotations/instances_{split}2017.json", "{split}2017"),
    ("annotations/instances_{split}.json", "images/{split}"),
    # Objects365 v2
    ("annotations/zhiyuan_objv2_{split}.json", "{split}"),
    # LVIS v1, whose file names include COCO's folders of images
    ("annotations/lvis_v1_{split}.json", ""),
)

# Folder of the semantic maps (PNG), which have the names of the images.
SEMANTIC_FOLDER = "stuffthingmaps"


class CocoSet(DivisibleImages):
    """The images of a split with their objects.

    `len(s)` is the number of images, `s[i]` the path of image i, `s.read(i)` its bytes, and
    `s.target(i)` its objects. Images are in the order of their ids. A label is the number of a
    category in the order of the category ids, counted from 0.

    Attributes:
        annotations: Path of the JSON file.
        findings: Objects and images that were left out or clipped.
        fingerprint: A hash of the images' names, the categories and the objects.
        has_masks: Whether the objects have segmentations, which Objects365 lacks.
        category_ids: For each label, the category's id in the file.
        category_names: For each label, the category's name.
    """

    def __init__(self, root: str, folder: str, annotations: str, listing: Listing) -> None:
        self.root, self.folder = root, os.path.join(root, folder)
        self.annotations, self._listing = annotations, listing
        self.places = np.arange(len(listing))
        facts = listing.facts
        self.findings = Findings(facts["counts"], facts["examples"])
        self.fingerprint = listing.fingerprint
        self.has_masks: bool = facts["has_masks"]
        self.category_ids = tuple(facts["category_ids"])
        self.category_names = tuple(facts["category_names"])

    def __getitem__(self, index: int) -> str:
        return os.path.join(self.root, self._file_name(index))

    def read(self, index: int) -> bytearray:
        """Reads the bytes of image `index`.

        Raises: DataError: if the file cannot be read.
        """
        return read_image(self[index])

    def image_id(self, index: int) -> int:
        """Returns the id of image `index` in the annotations."""
        return self._listing.number("image_ids", self.places[index])

    @property
    def only(self) -> tuple[int, ...]:
        """The ids of the images if they are only a part of the split; () for the whole split."""
        is_part = len(self) < len(self._listing)
        return tuple(self._listing.arrays["image_ids"][self.places].tolist()) if is_part else ()

    def size(self, index: int) -> tuple[int, int]:
        """Returns height and width of image `index` according to the annotations."""
        height, width = self._listing.arrays["sizes"][self.places[index]].tolist()
        return height, width

    def objects(self, index: int) -> ImageObjects:
        """Returns the objects of image `index`, in pixels of the image.

        Segmentations are not decoded: they stay polygons or compressed run lengths.
        """
        arrays, place = self._listing.arrays, self.places[index]
        start, stop = arrays["first"][place : place + 2].tolist()
        crowd = arrays["crowd"][start:stop]
        numbers = np.flatnonzero(~crowd) + start
        return ImageObjects(
            arrays["boxes"][numbers],
            arrays["labels"][numbers],
            [self._segmentation(number) for number in numbers.tolist()] if self.has_masks else [],
            arrays["boxes"][start:stop][crowd],
            self.image_id(index),
            *self.size(index),
        )

    def target(self, index: int) -> Target:
        """Returns the target of image `index`, whole and at its own size, with decoded masks."""
        return make_target(self.objects(index), whole_view(*self.size(index)), self.size(index))

    def check_semantic(self, num_classes: int, *, where: str) -> None:
        """Checks that the dataset has semantic maps, by reading the map of the first image.

        Args:
            num_classes: Number of semantic classes.
            where: The field that names the dataset, for messages.

        Raises: DataError: if there is no folder of maps, or the first map cannot be used.
        """
        if kind_of(folder := os.path.join(self.root, SEMANTIC_FOLDER)) != "folder":
            raise DataError(
                f"{where}: no class maps; got no folder {folder}, expected the maps of "
                "COCO-Stuff. Unpack the maps there, or set --task.detection.semantic_classes 0."
            )
        self.semantic(0, num_classes)

    def semantic(self, index: int, num_classes: int) -> NDArray[np.int32]:
        """Reads the semantic map (H, W) of image `index`, the class of each pixel.

        Unlabelled pixels are 255. The map is a PNG below `stuffthingmaps/`, with the relative path
        of the image. The classes include COCO-Stuff's stuff classes.

        Raises:
            DataError: if the file cannot be read, has another size than the image, or has classes
                of `num_classes` or more.
        """
        name = os.path.splitext(self._file_name(index))[0] + ".png"
        path = os.path.join(self.root, SEMANTIC_FOLDER, name)
        numbers = read_numbers(path, ("L", "P"), "a map of classes, one byte a pixel")
        known = numbers[numbers != UNLABELLED]
        if numbers.shape != self.size(index) or known.max(initial=0) >= num_classes:
            height, width = self.size(index)
            raise DataError(
                f"{path}: not a class map of the image; got {numbers.shape[1]} x "
                f"{numbers.shape[0]} pixels up to {known.max(initial=0)}, expected {width} x "
                f"{height} and classes below {num_classes}. Fetch COCO-Stuff's maps again, or set "
                "--task.detection.semantic_classes."
            )
        return numbers

    def landscape(self) -> NDArray[np.bool_]:
        """Returns for each of the N images whether it is at least as wide as high, (N,) bool."""
        heights, widths = self._listing.arrays["sizes"][self.places].T
        return widths >= heights

    def summary(self) -> str:
        """Returns lines of text with the numbers of images and objects, and with their defects."""
        crowd = self._listing.arrays["crowd"]
        crowds = int(crowd.sum())
        contents = (
            f"{self.annotations}: {len(self):,} images, "
            f"{len(crowd) - crowds:,} objects, {crowds:,} crowds, "
            f"{len(self.category_ids)} categories"
        )
        return "\n".join([contents, *(f"  {line}" for line in self.findings.lines())])

    def _file_name(self, index: int) -> str:
        """Returns the path of image `index` relative to the dataset's folder."""
        return os.fsdecode(self._listing.name(int(self.places[index])))

    def _segmentation(self, number: int) -> list[NDArray[np.float64]] | bytes:
        """Returns the polygons, (points, 2) each, or the compressed run lengths of an object.

        Args:
            number: Index of the object among the objects of all images.
        """
        arrays = self._listing.arrays
        start, stop = arrays["rle_first"][number : number + 2].tolist()
        if start < stop:
            return arrays["rle"][start:stop].tobytes()
        first, last = arrays["polygon_first"][number : number + 2].tolist()
        ends = arrays["point_first"][first : last + 1].tolist()
        return [arrays["points"][start:stop] for start, stop in pairwise(ends)]


def open_coco(root: str, split: str, *, where: str = "data.root") -> CocoSet:
    """Opens a split of a dataset in COCO's layout, and logs its contents and findings.

    In the split "train", an image is left out if its file is missing, or if it has no objects
    other than crowds. Any other split is for evaluation, and all its images must exist.

    Args:
        root: The dataset's folder, in the layout of COCO (`train2017/` with
            `annotations/instances_train2017.json`), of Objects365 or of LVIS, or with
            `images/train/` and `annotations/instances_train.json`.
        split: "train", "val", or another split that the layout has.
        where: The field that names the folder, for messages.

    Raises:
        DataError: if there is no such split, if its JSON file is not in COCO's format, or if images
            are missing.
    """
    coco_masks()  # A missing package is reported before minutes of reading.
    annotations, folder = _find(root, split, where)
    path, training = os.path.join(root, annotations), split == "train"

    def make() -> Made:
        stamps, files = {annotations: _stamp(path)}, _Files(root, folder)
        arrays, facts = read_objects(
            path, Findings(), find_file=files.find, keep_empty=not training, where=where
        )
        return arrays, {**facts, "stamps": stamps | files.stamps}

    def is_current(facts: dict[str, Any]) -> bool:
        return all(
            _stamp(os.path.join(root, inside)) == stamp and settled(stamp[1], facts["listed_at"])
            for inside, stamp in facts["stamps"].items()
        )

    subject = "annotations with images" if training else "annotations"
    listing = listed(subject, path, make=make, is_current=is_current)
    opened = CocoSet(root, folder, path, listing)
    findings = opened.findings
    missing, num_images = findings.counts.get(NO_FILE, 0), len(opened)
    if missing and not (training and num_images):
        names = ", ".join(findings.names[NO_FILE])
        raise DataError(
            f"{where}: images of {annotations} are missing; got {missing} without a file in "
            f"{os.path.join(root, folder)!r} ({names}), expected all images. Unpack the images "
            f"there, or set --{where} to the folder that holds both."
        )
    if not num_images:
        raise DataError(
            f"{where}: no objects in {annotations}; got no image with an object, expected at "
            f"least one. Set --{where} to another dataset."
        )
    if findings.counts:
        log.warning("%s", opened.summary())
    else:
        log.info("%s", opened.summary())
    return opened


def _find(root: str, split: str, where: str) -> tuple[str, str]:
    tried = [(json.format(split=split), folder.format(split=split)) for json, folder in LAYOUTS]
    for file, folder in tried:
        if kind_of(os.path.join(root, file)) == "file":
            return file, folder
    raise DataError(
        f"{where}: no annotations of the split {split!r}; got {root!r}, expected a folder with "
        f"{', '.join(json for json, _ in tried[:-1])} or {tried[-1][0]}. Set --{where} to the "
        "folder that COCO was unpacked in."
    )


def _stamp(path: str) -> list[int]:
    """Returns the size in bytes and the modification time in nanoseconds of a file or folder.

    The values change when the file is written, or when an entry of the folder is added or removed.
    The result is [0, 0] if there is no such file or folder.
    """
    try:
        status = os.stat(path)
    except OSError:
        return [0, 0]
    return [status.st_size, status.st_mtime_ns]


class _Files:
    """Checks which images exist, by listing each folder once instead of a request for each file.

    Args:
        root: Folder of the dataset.
        folder: Folder of the images, relative to the root.

    Attributes:
        stamps: {path of a listed folder, relative to the root: the folder's `_stamp` just before
            the folder was listed}.
    """

    def __init__(self, root: str, folder: str) -> None:
        self._root, self._folder = root, folder
        self.stamps: dict[str, list[int]] = {}
        self._names: dict[str, frozenset[str]] = {}

    def find(self, name: str) -> str | None:
        """Returns an image's path relative to the root, or None if there is no such file.

        Args:
            name: The image's name in the annotations. Leading folders of the name that do not exist
                in the folder of the images are dropped.
        """
        for *folders, last in paths_below(name):
            inside = os.path.join(self._folder, *folders)
            if last in self._listing(inside):
                return os.path.join(inside, last)
        return None

    def _listing(self, inside: str) -> frozenset[str]:
        if inside not in self._names:
            path = os.path.join(self._root, inside)
            self.stamps[inside] = _stamp(path)
            try:
                self._names[inside] = frozenset(os.listdir(path))
            except OSError:
                self._names[inside] = frozenset()
        return self._names[inside]

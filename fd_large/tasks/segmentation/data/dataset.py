"""Images with label files of the same stem: ADE20K, Cityscapes, COCO-Stuff, and plain folders."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fd_large.data.decode import MAX_PIXELS, decode
from fd_large.data.folder import ImageFolder, read_image
from fd_large.errors import DataError
from fd_large.tasks.segmentation.data.labels import class_labels

log = logging.getLogger(__name__)

FILES_CHECKED = 8
"""Label files that are read before a run starts, spread over the dataset."""


class Layout(NamedTuple):
    """Where a dataset has its images and its labels.

    Attributes:
        images: Folder of the images of a split.
        labels: Folder of their label files, in which the same folders lie.
        train: What the dataset calls the split "train".
        val: What it calls the split "val".
        image_tail: What follows the common part of a name in an image's stem.
        label_tail: What follows it in a label's stem.
    """

    images: str
    labels: str
    train: str = "train"
    val: str = "val"
    image_tail: str = ""
    label_tail: str = ""

    def folders(self, root: str, split: str) -> tuple[str, str]:
        """Returns the folders of the images and the labels of a split."""
        name = {"train": self.train, "val": self.val}.get(split, split)
        images, labels = (part.format(split=name) for part in (self.images, self.labels))
        return os.path.join(root, images), os.path.join(root, labels)


ADE20K = Layout("images/{split}", "annotations/{split}", "training", "validation")
CITYSCAPES = Layout(
    "leftImg8bit/{split}",
    "gtFine/{split}",
    image_tail="_leftImg8bit",
    label_tail="_gtFine_labelTrainIds",
)
LAYOUTS = (
    ADE20K,
    ADE20K._replace(
        images="ADEChallengeData2016/images/{split}",
        labels="ADEChallengeData2016/annotations/{split}",
    ),
    CITYSCAPES,
    # COCO-Stuff, converted for mmsegmentation and as it comes.
    Layout("images/{split}2017", "annotations/{split}2017", label_tail="_labelTrainIds"),
    Layout("images/{split}2017", "stuffthingmaps/{split}2017"),
    Layout("{split}2017", "stuffthingmaps/{split}2017"),
    Layout("images/{split}", "labels/{split}"),
    Layout("{split}/images", "{split}/labels"),
)


class SegmentationSet:
    """The images of a split: `len(s)`, `s[i]` (the path), `s.read(i)`, `s.labels(i)`.

    Args:
        images: The images.
        labels: The label files.
        pairs: (len(images),), the number of each image's label file.
        num_classes: K.
        ignore_value: See `class_labels`.
        reduce_zero_label: See `class_labels`.
        max_pixels: Larger images are refused.

    Attributes:
        fingerprint: A hash of the names.
    """

    def __init__(
        self,
        images: ImageFolder,
        labels: ImageFolder,
        pairs: NDArray[np.int64],
        *,
        num_classes: int,
        ignore_value: int,
        reduce_zero_label: bool,
        max_pixels: int,
    ) -> None:
        self._images, self._labels, self._pairs = images, labels, pairs
        self.num_classes, self._max_pixels = num_classes, max_pixels
        self._ignore_value, self._reduce_zero_label = ignore_value, reduce_zero_label
        both = images.fingerprint + labels.fingerprint
        self.fingerprint = hashlib.sha256(both.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> str:
        return self._images[index]

    def read(self, index: int) -> bytearray:
        """Reads the bytes of image `index`.

        Raises: DataError: if the file cannot be read.
        """
        return read_image(self[index])

    def label_file(self, index: int) -> str:
        """Returns the path of an image's label file."""
        return self._labels[int(self._pairs[index])]

    def labels(self, index: int) -> NDArray[np.int16]:
        """Reads the classes of the pixels of image `index`, (H, W), `IGNORED` among them.

        Raises: DataError: if the file cannot be read, or has invalid labels.
        """
        path = self.label_file(index)
        return class_labels(
            read_labels(path, max_pixels=self._max_pixels),
            num_classes=self.num_classes,
            ignore_value=self._ignore_value,
            reduce_zero_label=self._reduce_zero_label,
            where=path,
        )

    def sample(self, index: int) -> tuple[Tensor, NDArray[np.int16]]:
        """Reads image `index`, (3, H, W) uint8, and its labels, (H, W).

        Raises: DataError: if one cannot be read, or their sizes differ.
        """
        image = decode(self.read(index), self[index], max_pixels=self._max_pixels)
        labels = self.labels(index)
        if image.shape[-2:] != labels.shape:
            raise DataError(
                f"{self.label_file(index)}: not the size of its image; got {labels.shape[1]} x "
                f"{labels.shape[0]} pixels, expected {image.shape[-1]} x {image.shape[-2]}. Make "
                "the labels again."
            )
        return image, labels


def read_labels(path: str, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.integer]:
    """Reads the numbers of a label file, (H, W): grey of 8 or 16 bits, or a palette's indices.

    Raises: DataError: if the file cannot be read, or has colours without a palette.
    """
    encoded = read_image(path)
    try:
        with Image.open(io.BytesIO(encoded)) as file:
            if file.width * file.height > max_pixels:
                raise DataError(
                    f"{path}: too large; got {file.width} x {file.height} pixels, expected at most "
                    f"{max_pixels:,}. Set --data.max_pixels."
                )
            if file.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
                raise DataError(
                    f"{path}: invalid label file; got colours (mode {file.mode}), expected one "
                    "number a pixel. Convert the colours to the numbers of classes."
                )
            return np.array(file).astype(np.int32)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: cannot be decoded; got {error}, expected an image of labels. Fetch it again."
        ) from error


def open_segmentation(
    root: str,
    split: str,
    *,
    num_classes: int,
    ignore_value: int,
    reduce_zero_label: bool,
    max_pixels: int = MAX_PIXELS,
    where: str = "data.root",
) -> SegmentationSet:
    """Opens a split of a dataset in a folder, and reads some of its label files.

    Args:
        root: The folder: ADE20K's, Cityscapes', COCO-Stuff's, or one with images/SPLIT and
            labels/SPLIT, or SPLIT/images and SPLIT/labels.
        split: "train" or "val".
        num_classes: K.
        ignore_value: See `class_labels`.
        reduce_zero_label: See `class_labels`.
        max_pixels: Larger images are refused.
        where: The field that names the folder, for messages.

    Raises: DataError: if there is no such split, an image has no label file, or one of those that
        are read cannot be used.
    """
    layout = _layout_of(root, split, where)
    image_root, label_root = layout.folders(root, split)
    images, labels = (ImageFolder(folder, where=where) for folder in (image_root, label_root))
    numbers = {}
    for number in range(len(labels)):
        stem = _stem(labels[number], label_root)
        if stem.endswith(layout.label_tail):
            numbers[stem.removesuffix(layout.label_tail)] = number
    stems = [
        _stem(images[i], image_root).removesuffix(layout.image_tail) for i in range(len(images))
    ]
    missing = [stem for stem in stems if stem not in numbers]
    if missing:
        raise DataError(
            f"{where}: images without labels in {label_root}; got {len(missing)} of {len(stems)} "
            f"({missing[0]}), expected a file {missing[0]}{layout.label_tail}.png. Unpack the "
            "labels there, or take the images away."
        )
    opened = SegmentationSet(
        images,
        labels,
        np.array([numbers[stem] for stem in stems]),
        num_classes=num_classes,
        ignore_value=ignore_value,
        reduce_zero_label=reduce_zero_label,
        max_pixels=max_pixels,
    )
    for index in np.linspace(0, len(opened) - 1, min(FILES_CHECKED, len(opened))).round():
        opened.labels(int(index))
    log.info("%s: %d images with labels in %s", where, len(opened), image_root)
    return opened


def _layout_of(root: str, split: str, where: str) -> Layout:
    for layout in LAYOUTS:
        if all(os.path.isdir(folder) for folder in layout.folders(root, split)):
            return layout
    tried = ", ".join(
        " with ".join(os.path.relpath(folder, root) for folder in layout.folders(root, split))
        for layout in LAYOUTS
    )
    raise DataError(
        f"{where}: no images with labels of the split {split!r}; got {root!r}, expected a folder "
        f"with one of these pairs: {tried}. Set --{where} to the folder that holds both."
    )


def _stem(path: str, root: str) -> str:
    return os.path.splitext(os.path.relpath(path, root))[0]

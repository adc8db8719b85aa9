"""Datasets of images and label files: ADE20K, Cityscapes, COCO-Stuff, and plain folders."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from fd_large.data.image_header import MAX_PIXELS
from fd_large.tasks.dense.pairs import Layout, PairedImages, Pairs, pairs_in_folders, read_numbers
from fd_large.tasks.segmentation.data.labels import class_labels

log = logging.getLogger(__name__)

ADE20K = Layout("images/{split}", "annotations/{split}", "training", "validation")
CITYSCAPES = Layout(
    "leftImg8bit/{split}",
    "gtFine/{split}",
    image_tail="_leftImg8bit",
    truth_tail="_gtFine_labelTrainIds",
)
LAYOUTS = (
    ADE20K,
    ADE20K._replace(
        images="ADEChallengeData2016/images/{split}",
        truths="ADEChallengeData2016/annotations/{split}",
    ),
    CITYSCAPES,
    # COCO-Stuff, converted for mmsegmentation, and as published.
    Layout("images/{split}2017", "annotations/{split}2017", truth_tail="_labelTrainIds"),
    Layout("images/{split}2017", "stuffthingmaps/{split}2017"),
    Layout("{split}2017", "stuffthingmaps/{split}2017"),
    Layout("images/{split}", "labels/{split}"),
    Layout("{split}/images", "{split}/labels"),
)
# Grey of 8 or 16 bits, or a palette's indices.
MODES = ("1", "L", "P", "I", "I;16", "I;16B")


class SegmentationSet(PairedImages):
    """The images of a split with their label files; `s.truth(i)` returns the labels of image i.

    Args:
        pairs: The images and their label files.
        num_classes: Number of classes, K.
        ignore_value: The number in label files that marks ignored pixels.
        reduce_zero_label: True if 0 also marks ignored pixels and class k has the number k + 1;
            False if class k has the number k.
        max_pixels: Largest number of pixels of an image or label file. Reading a larger file raises
            DataError.
    """

    def __init__(
        self,
        pairs: Pairs,
        *,
        num_classes: int,
        ignore_value: int,
        reduce_zero_label: bool,
        max_pixels: int,
    ) -> None:
        super().__init__(pairs, max_pixels=max_pixels)
        self.num_classes = num_classes
        self._ignore_value, self._reduce_zero_label = ignore_value, reduce_zero_label

    def truth(self, index: int) -> NDArray[np.int16]:
        """Reads the labels of image `index`, (H, W): the class of each pixel, or `IGNORED`.

        Raises: DataError: if the label file cannot be read, or has invalid labels.
        """
        path = self.truth_file(index)
        return class_labels(
            read_numbers(
                path, MODES, "a label file, one number a pixel", max_pixels=self.max_pixels
            ),
            num_classes=self.num_classes,
            ignore_value=self._ignore_value,
            reduce_zero_label=self._reduce_zero_label,
            where=path,
        )


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
    """Opens a split of a dataset, and checks some of its label files by reading them.

    Args:
        root: The dataset's folder, in the layout of ADE20K, Cityscapes or COCO-Stuff, or with the
            folders images/SPLIT and labels/SPLIT, or SPLIT/images and SPLIT/labels.
        split: "train" or "val".
        num_classes, ignore_value, reduce_zero_label, max_pixels: As for `SegmentationSet`.
        where: The field that names the folder, for messages.

    Raises:
        DataError: if there is no such split, an image has no label file, or one of the files read
            cannot be used.
    """
    opened = SegmentationSet(
        pairs_in_folders(LAYOUTS, root, split, kind="labels", where=where),
        num_classes=num_classes,
        ignore_value=ignore_value,
        reduce_zero_label=reduce_zero_label,
        max_pixels=max_pixels,
    )
    opened.some_truths()
    log.info("%s: %s: %d images with labels in %s", where, split, len(opened), root)
    return opened

"""Converts the numbers in a label file to labels, in which classes are counted from 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fd_large.errors import DataError
from fd_large.tasks.segmentation.loss import IGNORED


def class_labels(
    numbers: NDArray[np.integer],
    *,
    num_classes: int,
    ignore_value: int,
    reduce_zero_label: bool,
    where: str,
) -> NDArray[np.int16]:
    """Returns the labels of an image's pixels.

    Args:
        numbers: (H, W), the numbers in the label file.
        num_classes: Number of classes, K.
        ignore_value: The number that marks ignored pixels.
        reduce_zero_label: True if 0 also marks ignored pixels and class k has the number k + 1, as
            in ADE20K; False if class k has the number k.
        where: The file, for messages.

    Returns: (H, W) int16, a class in 0..K - 1 or `IGNORED` for each pixel.
    Raises: DataError: if a number belongs to no class and is not ignored.
    """
    first = int(reduce_zero_label)
    ignored = numbers == ignore_value
    if reduce_zero_label:
        ignored |= numbers == 0
    # Before the cast, in which 65537 would become 1.
    invalid = numbers[~ignored & ((numbers < first) | (numbers >= first + num_classes))]
    if invalid.size:
        raise DataError(
            f"{where}: invalid label; got {int(invalid[0])}, expected {first} to "
            f"{num_classes - 1 + first}, or {ignore_value} for ignored pixels. Set "
            "--task.segmentation.num_classes, --task.segmentation.ignore_value or "
            "--task.segmentation.reduce_zero_label."
        )
    return np.where(ignored, IGNORED, numbers.astype(np.int32, copy=False) - first).astype(np.int16)

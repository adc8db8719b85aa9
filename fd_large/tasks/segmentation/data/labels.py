"""The classes of an image's pixels: from the numbers in a file to labels from 0."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fd_large.tasks.segmentation.loss import IGNORED


def class_labels(
    numbers: NDArray[np.integer], *, ignore_value: int, reduce_zero_label: bool
) -> NDArray[np.int16]:
    """Returns labels from the numbers of a file.

    Args:
        numbers: (H, W), as a file has them.
        ignore_value: The number of pixels that are neither learnt nor scored.
        reduce_zero_label: Whether 0 is ignored as well and class k has the number k + 1, as in
            ADE20K.

    Returns: (H, W), classes from 0, or `IGNORED`.
    """
    labels = numbers.astype(np.int16)
    ignored = numbers == ignore_value
    if reduce_zero_label:
        ignored |= numbers == 0
        labels -= 1
    labels[ignored] = IGNORED
    return labels

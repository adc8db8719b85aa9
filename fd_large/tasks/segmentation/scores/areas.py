"""Segmentation scores from the confusion matrix: aAcc, mAcc, mIoU, and scores of each class.

The confusion matrix is summed over images and ranks in int64, which is exact, so that the scores do
not depend on the number of ranks. (mmsegmentation sums in float32.)

Source: mmsegmentation, iou_metric.py; a test compares the scores.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large.tasks.segmentation.loss import IGNORED


def confusion(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Returns the confusion matrix of the labelled pixels.

    Args:
        predicted: (..., H, W), any integer dtype, predicted classes.
        labels: (..., H, W), any integer dtype, true classes or `IGNORED`.
        num_classes: Number of classes, K.

    Returns: (K, K) int64; entry (i, j) is the number of pixels with label i and prediction j.
    """
    counted = labels != IGNORED
    pairs = labels[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


class Scores(NamedTuple):
    """Scores over a whole dataset, in per cent.

    Attributes:
        a_acc: Accuracy over all labelled pixels.
        m_acc: Mean of `acc` over the classes that occur in the labels.
        m_iou: Mean of `iou` over the classes that occur in labels or predictions.
        iou: (K,), intersection over union of each class; NaN for a class that occurs in neither
            labels nor predictions.
        acc: (K,), accuracy over the pixels with each label; NaN for a class that occurs in no
            label.
        counts: (K, K) int64, the confusion matrix, in pixels.
    """

    a_acc: float
    m_acc: float
    m_iou: float
    iou: NDArray[np.float64]
    acc: NDArray[np.float64]
    counts: NDArray[np.int64]

    def numbers(self) -> dict[str, float]:
        """Returns {name: value} of mIoU, mAcc and aAcc, in per cent."""
        return {"mIoU": self.m_iou, "mAcc": self.m_acc, "aAcc": self.a_acc}


def scores_of(counts: NDArray[np.int64]) -> Scores:
    """Computes all scores from the confusion matrix of a dataset.

    Args:
        counts: (K, K) int64, the sum of `confusion` over the images.
    """
    right, labelled, predicted = np.diagonal(counts), counts.sum(1), counts.sum(0)
    iou = _shares(right, labelled + predicted - right)
    acc = _shares(right, labelled)
    return Scores(
        float(_shares(right.sum(keepdims=True), labelled.sum(keepdims=True))[0]),
        _mean(acc),
        _mean(iou),
        iou,
        acc,
        counts,
    )


def m_iou(
    right: NDArray[np.int64], labelled: NDArray[np.int64], predicted: NDArray[np.int64]
) -> float:
    """Returns the mIoU in per cent, from three counts of pixels for each class.

    Args:
        right: (K,), the number of pixels with this class as label and as prediction.
        labelled: (K,), the number of pixels with this class as label.
        predicted: (K,), the number of labelled pixels with this class as prediction.
    """
    return _mean(_shares(right, labelled + predicted - right))


def _shares(some: NDArray[np.int64], all_: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns 100 * some / all_ for each entry, NaN where `all_` is 0."""
    return np.divide(100.0 * some, all_, out=np.full(len(some), np.nan), where=all_ > 0)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")

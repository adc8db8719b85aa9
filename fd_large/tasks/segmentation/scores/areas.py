"""Scores of segmentation from counts of pixels: aAcc, mAcc, mIoU, and scores by class.

All scores come from one table of counts, whose sums over images and ranks are exact in int64, so
that they do not depend on the number of ranks. (mmsegmentation sums in float32.)

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
    """Counts the labelled pixels by label and prediction.

    Args:
        predicted: (..., H, W), any integer dtype, classes.
        labels: The same shape, classes or `IGNORED`.
        num_classes: K.

    Returns: (K, K) int64: row the label, column the prediction.
    """
    counted = labels != IGNORED
    pairs = labels[counted].long() * num_classes + predicted[counted].long()
    return torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


class Scores(NamedTuple):
    """Scores over a whole dataset, in per cent.

    Attributes:
        a_acc: Share of the labelled pixels that are right.
        m_acc: Mean, over the labelled classes, of the share of a class's pixels that is right.
        m_iou: Mean intersection over union of the classes that are labelled or predicted.
        iou: (K,), NaN for classes that are neither labelled nor predicted.
        acc: (K,), NaN for classes that are not labelled.
        counts: (K, K) int64, from `confusion`.
    """

    a_acc: float
    m_acc: float
    m_iou: float
    iou: NDArray[np.float64]
    acc: NDArray[np.float64]
    counts: NDArray[np.int64]

    def numbers(self) -> dict[str, float]:
        """Returns the three means by their names in the literature."""
        return {"mIoU": self.m_iou, "mAcc": self.m_acc, "aAcc": self.a_acc}


def scores_of(counts: NDArray[np.int64]) -> Scores:
    """Computes the scores of a table of counts.

    Args:
        counts: (K, K) int64, from `confusion`, summed over the dataset.
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
    """Returns the mIoU, in per cent, from numbers of pixels of each class, (K,) each.

    Args:
        right: Number of pixels of the class by both label and prediction.
        labelled: Number of pixels of the class by label.
        predicted: Number of pixels of the class by prediction.
    """
    return _mean(_shares(right, labelled + predicted - right))


def _shares(some: NDArray[np.int64], all_: NDArray[np.int64]) -> NDArray[np.float64]:
    """Returns the shares of totals in per cent, NaN where the total is 0."""
    return np.divide(100.0 * some, all_, out=np.full(len(some), np.nan), where=all_ > 0)


def _mean(values: NDArray[np.float64]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")

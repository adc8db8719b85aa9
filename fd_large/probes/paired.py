"""The difference of two models on the same test images, with an interval over the images.

Both models see each image, and most images are easy or hard for both: the difference of their
accuracies is far more certain than either accuracy. The interval says what another draw of test
images would change; what another seed changes is the spread over seeds.

Source: Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapter 13 (percentiles).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
LEVEL = 0.95


class Difference(NamedTuple):
    """The accuracy of a model less that of another, in points.

    Attributes:
        mean: On these images, and over the seeds of each.
        low: Lower end of the interval.
        high: Upper end of the interval.
    """

    mean: float
    low: float
    high: float

    @property
    def is_shown(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def difference(right: NDArray[np.bool_], other: NDArray[np.bool_], *, seed: int = 0) -> Difference:
    """Compares two models by a paired bootstrap over test images.

    Args:
        right: (S, N), whether each seed of the model classified each image correctly.
        other: (T, N), the same of the other model.
        seed: Seed of the draws.

    Raises: ValueError: if there is no image, or they are not of the same images.
    """
    if not right.shape[1] or right.shape[1] != other.shape[1]:
        raise ValueError(f"not the same images; got {right.shape[1]} and {other.shape[1]}")
    gaps = 100 * (right.mean(0, dtype=np.float64) - other.mean(0, dtype=np.float64))
    # An image enters by its gap alone, and there are few gaps: a draw of N images is a draw of how
    # many have each.
    values, counts = np.unique(gaps, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(gaps), counts / len(gaps), size=DRAWS)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn @ values / len(gaps), (tail, 1 - tail))
    return Difference(float(gaps.mean()), float(low), float(high))

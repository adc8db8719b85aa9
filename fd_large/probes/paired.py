"""The difference of two models on the same test images, with an interval over images and seeds.

Both models see each image, and most images are easy or hard for both, so the difference of their
scores is far more certain than either score. The interval covers two sources of variation: the
choice of test images, by a paired bootstrap over images, and the seed of the training, by Student's
t on the spread over seeds (Welch, since the models' spreads may differ). The squares of the half
widths of both intervals are added. Part of the variation over seeds is also in the bootstrap, which
makes the interval slightly too wide, not too narrow. With a single seed the interval covers only
the choice of images, and so does not show that the models differ.

The interval does not cover the variation between repeated pre-trainings: it compares these two
models, not the methods that made them.

Sources: Efron and Tibshirani, "An introduction to the bootstrap", 1993, chapter 13 (percentiles);
Welch, "The generalization of Student's problem", 1947.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fd_large.probes.redrawn import Redrawn

DRAWS = 10_000
LEVEL = 0.95
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)
"""The bounds of the central 95% of Student's t distribution, for 1 to 12 degrees of freedom."""
_NORMAL = 1.960


class Difference(NamedTuple):
    """The score of one model minus the score of another, with its 95% interval.

    Attributes:
        mean: Difference of the mean scores over the test images and each model's seeds.
        low: Lower end of the interval.
        high: Upper end of the interval.
        of_images: (low, high) of the interval over the choice of test images alone.
        holds_seeds: Whether low and high also cover other seeds; if not, they equal `of_images`.
    """

    mean: float
    low: float
    high: float
    of_images: tuple[float, float]
    holds_seeds: bool

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def difference(right: NDArray[Any], other: NDArray[Any], *, seed: int = 0) -> Difference:
    """Returns the difference of two models' accuracies on the same test images, in per cent.

    Args:
        right: (S, N), whether each of the model's S trainings classifies each image correctly.
        other: (T, N), the same for the T trainings of the other model.
        seed: Seed of the bootstrap draws.

    Raises: ValueError: if there are no images, or the two arrays have different numbers of images.
    """
    if not right.shape[1] or right.shape[1] != other.shape[1]:
        raise ValueError(f"not the same images; got {right.shape[1]} and {other.shape[1]}")
    gaps = 100 * (right.mean(0, dtype=np.float64) - other.mean(0, dtype=np.float64))
    # Only the difference of an image's scores matters, and it has few values, so a draw of N images
    # is drawn as the number of images with each value.
    values, counts = np.unique(gaps, return_counts=True)
    drawn = np.random.default_rng(seed).multinomial(len(gaps), counts / len(gaps), size=DRAWS)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(drawn @ values / len(gaps), (tail, 1 - tail))
    ours, others = (100 * scored.mean(1, dtype=np.float64) for scored in (right, other))
    return _with_seeds(float(gaps.mean()), (float(low), float(high)), ours, others)


def difference_of_redrawn(ours: Sequence[Redrawn], others: Sequence[Redrawn]) -> Difference | None:
    """Returns the difference of two models' scores, from the same bootstrap draws of test images.

    Args:
        ours: The scores of the model, one entry for each seed.
        others: The scores of the other model, one entry for each seed.

    Returns: the difference, or None if the scores are not of the same images and draws.
    """
    if len({(seed.images, len(seed.draws)) for seed in (*ours, *others)}) > 1:
        return None
    means = [
        np.mean([seed.draws for seed in scores], axis=0, dtype=np.float64)
        for scores in (ours, others)
    ]
    half = _NORMAL * float(np.std(means[0] - means[1], ddof=1))
    first, second = (np.array([seed.score for seed in scores]) for scores in (ours, others))
    mean = float(first.mean() - second.mean())
    return _with_seeds(mean, (mean - half, mean + half), first, second)


def _with_seeds(
    mean: float,
    of_images: tuple[float, float],
    ours: NDArray[np.float64],
    others: NDArray[np.float64],
) -> Difference:
    """Returns a difference whose interval over images is widened by the variation over seeds.

    If a model has a single seed, the interval stays unchanged.

    Args:
        mean: The difference of the mean scores.
        of_images: (low, high) of the interval over images.
        ours: The score of each seed of the model.
        others: The score of each seed of the other model.
    """
    low, high = of_images
    if min(len(ours), len(others)) < 2:
        return Difference(mean, low, high, of_images, holds_seeds=False)
    variances = [float(np.var(scores, ddof=1)) / len(scores) for scores in (ours, others)]
    half = student_t(_degrees(variances, (len(ours), len(others)))) * sum(variances) ** 0.5
    below, above = np.hypot(mean - low, half), np.hypot(high - mean, half)
    return Difference(mean, mean - float(below), mean + float(above), of_images, holds_seeds=True)


def _degrees(variances: Sequence[float], counts: Sequence[int]) -> float:
    """Returns Welch's degrees of freedom of a difference of two means.

    Args:
        variances: Variance of each mean.
        counts: Number of values of each mean.
    """
    of_each = sum(v**2 / (n - 1) for v, n in zip(variances, counts, strict=True))
    return sum(variances) ** 2 / of_each if of_each else float(sum(counts) - 2)


def student_t(degrees: float) -> float:
    """Returns the t for which Student's t distribution has 95% of its mass between -t and t.

    Args:
        degrees: Degrees of freedom, which are rounded down, and count as 1 if there are fewer and
            as 12 if there are more.
    """
    return T95[min(max(int(degrees), 1), len(T95)) - 1]

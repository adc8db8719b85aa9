"""Intervals of differences: against scipy's bootstrap, and how often they hold."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from fd_large.probes.paired import difference


def drawn(seed: int, seeds: int, images: int, accuracies: tuple[float, float]):
    """Two models whose images are hard and easy alike."""
    rng = np.random.default_rng(seed)
    hardness = rng.random(images)
    return [(hardness < accuracy) ^ (rng.random((seeds, images)) < 0.1) for accuracy in accuracies]


def test_it_is_scipys_paired_bootstrap():
    one, other = drawn(0, 3, 2000, (0.60, 0.57))
    found = difference(one, other)
    gaps = 100 * (one.mean(0) - other.mean(0))
    assert found.mean == pytest.approx(gaps.mean())
    theirs = scipy.stats.bootstrap(
        (gaps,), np.mean, n_resamples=5000, method="percentile", random_state=1
    ).confidence_interval
    # Both are draws: their ends spread by some hundredths of a point.
    assert (found.low, found.high) == pytest.approx(tuple(theirs), abs=0.1)
    assert found.is_shown


def test_nineteen_of_twenty_intervals_hold_the_truth():
    held = sum(
        found.low <= 3.0 * 0.8 <= found.high
        for seed in range(100)
        for found in [difference(*drawn(seed, 2, 1000, (0.60, 0.57)))]
    )
    # 100 trials with probability .95 give fewer than 88 twice in a thousand times.
    assert 88 <= held <= 100


def test_equal_models_differ_by_nothing():
    one, _ = drawn(0, 1, 100, (0.6, 0.6))
    found = difference(one, one)
    assert found == (0.0, 0.0, 0.0)
    assert not found.is_shown
    with pytest.raises(ValueError, match="got 100 and 50"):
        difference(one, one[:, :50])

"""Differences in summary.json: what their intervals are over, and when one is shown."""

from __future__ import annotations

import numpy as np
import pytest

from fd_large.evaluation.differences import as_json
from fd_large.probes.paired import difference


@pytest.mark.parametrize(
    ("seeds", "is_random", "over", "is_shown", "needs_seeds"),
    [
        (3, True, "images and seeds", True, False),
        (1, True, "images", False, True),
        (1, False, "images", True, False),
        # Repetitions of what has no randomness are one.
        (2, False, "images", True, False),
    ],
)
def test_a_training_of_one_seed_shows_nothing(seeds, is_random, over, is_shown, needs_seeds):
    draw = np.random.default_rng(0).random((2, seeds, 3000))
    found = as_json(difference(draw[0] < 0.8, draw[1] < 0.5), is_random=is_random)
    assert (found["over"], found["is_shown"], found["needs_seeds"]) == (over, is_shown, needs_seeds)
    low, high = found["interval_of_images"]
    assert found["interval"][0] <= low < found["mean"] < high <= found["interval"][1]

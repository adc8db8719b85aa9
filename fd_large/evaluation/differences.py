"""Entries of summary.json for the difference between two models' scores, with its interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fd_large.probes.paired import Difference


def as_json(difference: Difference, *, is_random: bool = True) -> dict[str, Any]:
    """Returns a difference, its interval, and whether it is shown.

    A difference is shown if its interval excludes 0. The interval accounts for the choice of test
    images and, if trainings are random, of seeds; with one seed of these, no difference is shown.

    Args:
        difference: The difference, with the intervals of `probes.paired`.
        is_random: Whether another seed gives other values.
    """
    of_all = difference.holds_seeds or not is_random
    low, high = (difference.low, difference.high) if is_random else difference.of_images
    return {
        "mean": difference.mean,
        "interval": [low, high],
        "interval_of_images": list(difference.of_images),
        "over": "images and seeds" if is_random and difference.holds_seeds else "images",
        "is_shown": of_all and (low > 0 or high < 0),
        "needs_seeds": not of_all,
    }

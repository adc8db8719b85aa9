"""Writes the difference between two models' scores, with its interval, for summary.json."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fd_large.probes.paired import Difference


def as_json(difference: Difference, *, is_random: bool = True) -> dict[str, Any]:
    """Returns the entry of summary.json for a difference.

    The entry has the mean, its interval, and whether the difference is shown, which needs an
    interval that excludes 0. The interval accounts for the choice of test images and, if the
    scores depend on a seed, of seeds. With a single seed, a difference of scores that depend on
    the seed is not shown.

    Args:
        difference: The difference, with the intervals of `probes.paired`.
        is_random: Whether the scores depend on a seed.
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

"""Differences of models as summary.json has them, with what their intervals hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fd_large.probes.paired import Difference


def as_json(found: Difference, *, is_random: bool = True) -> dict[str, Any]:
    """Returns a difference, its interval, and whether it is shown.

    It is where the interval over all that another measurement would change excludes 0: of trainings
    images and seeds, so that those of one seed show none; of what has no randomness the images.

    Args:
        found: The difference.
        is_random: Whether another seed gives other values.
    """
    of_all = found.holds_seeds or not is_random
    low, high = (found.low, found.high) if is_random else found.of_images
    return {
        "mean": found.mean,
        "interval": [low, high],
        "interval_of_images": list(found.of_images),
        "over": "images and seeds" if is_random and found.holds_seeds else "images",
        "is_shown": of_all and (low > 0 or high < 0),
        "needs_seeds": not of_all,
    }

"""Unusable images are counted and named once in the log; past a limit they end the run.

Each rank counts the images that it tried itself. `past_limit`, `limit_error` and `agreed_error`
take sums over ranks, so that all ranks come to the same decision in the same step.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from fd_large.errors import DataError, first_names
from fd_large.ranks import distributed

log = logging.getLogger(__name__)

# Least number of samples of which the fraction is taken: one bad image among the first ten must not
# count as a tenth.
FEWEST_SAMPLES = 1000
MAX_NAMES = 20
_MAX_REMEMBERED = 10_000


class BadCount(NamedTuple):
    """Numbers of unusable samples and of tried samples, which can be summed over ranks."""

    num_bad: int
    num_tried: int


class BadImages:
    """The counts of one rank since the start of the process."""

    def __init__(self) -> None:
        self.count = BadCount(0, 0)
        self.names: list[str] = []
        self._known: set[str] = set()

    def add(self, num_samples: int, bad: Sequence[str]) -> None:
        """Counts a batch and names new bad images in the log.

        Args:
            num_samples: Number of sound samples in the batch.
            bad: A message for each sample that was tried and replaced, its name first.
        """
        num_bad, num_tried = self.count
        self.count = BadCount(num_bad + len(bad), num_tried + num_samples + len(bad))
        for message in bad:
            name = message.partition(": ")[0]
            if name in self._known or len(self._known) >= _MAX_REMEMBERED:
                continue  # seen in another epoch, or too many to list one by one
            self._known.add(name)
            self.names.append(name)
            log.warning("skipped: %s", message)


def past_limit(count: BadCount, max_bad_fraction: float) -> bool:
    """Whether a run has to stop; the same on all ranks, given the sum of their counts."""
    return count.num_bad > max_bad_fraction * max(count.num_tried, FEWEST_SAMPLES)


def agreed_error(
    count: BadCount, max_bad_fraction: float, names: Sequence[str]
) -> DataError | None:
    """Returns the error that ends the run, the same on every rank, or None; all ranks call it.

    Args:
        count: The sum over ranks.
        max_bad_fraction: data.max_bad_fraction.
        names: This rank's bad images.
    """
    if not past_limit(count, max_bad_fraction):
        return None
    everywhere = [name for rank in distributed.gather_objects(names) for name in rank]
    error = limit_error(count, max_bad_fraction, everywhere)
    error.agreed = True
    return error


def limit_error(count: BadCount, max_bad_fraction: float, names: Iterable[str]) -> DataError:
    """Returns the error for too many bad images, with a list of them.

    Args:
        count: The sum over ranks.
        max_bad_fraction: data.max_bad_fraction.
        names: Names of bad images, from one rank or all.
    """
    distinct = sorted(set(names))
    named = first_names(distinct, MAX_NAMES) + " (see the log)" * (len(distinct) > MAX_NAMES)
    return DataError(
        f"data.max_bad_fraction: too many images cannot be used; got {count.num_bad} of "
        f"{count.num_tried} samples, expected at most {max_bad_fraction:g} of them "
        f"(of {FEWEST_SAMPLES:,} while fewer were tried): {named}. "
        "Replace or remove these files, or raise --data.max_bad_fraction."
    )

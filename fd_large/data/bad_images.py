"""Counts unusable images, names each of them once in the log, and ends a run with too many.

Each rank counts the images that it tried itself. `past_limit`, `limit_error` and `agreed_error`
take counts summed over ranks, so that all ranks come to the same decision in the same step.
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
    """Numbers of samples that were tried, which can be summed over ranks.

    Attributes:
        num_bad: Number of tried samples that could not be used.
        num_tried: Number of all tried samples.
    """

    num_bad: int
    num_tried: int


class BadImages:
    """Counts and names of the unusable images of one rank, since the start of the process.

    Attributes:
        count: The counts.
        names: Names of the unusable images without repeats, at most 10,000.
    """

    def __init__(self) -> None:
        self.count = BadCount(0, 0)
        self.names: list[str] = []
        self._known: set[str] = set()

    def add(self, num_samples: int, bad: Sequence[str]) -> None:
        """Counts the samples of a batch, and names new bad images in the log.

        Args:
            num_samples: Number of usable samples in the batch.
            bad: A message "NAME: REASON" for each sample that was tried and replaced.
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
    """Whether a run must stop, because more than `data.max_bad_fraction` of its samples are bad.

    The fraction is the number of bad samples divided by the number of tried samples, or by
    `FEWEST_SAMPLES` while fewer samples were tried. The counts are summed over ranks, so that all
    ranks get the same result.
    """
    return count.num_bad > max_bad_fraction * max(count.num_tried, FEWEST_SAMPLES)


def agreed_error(
    count: BadCount, max_bad_fraction: float, names: Sequence[str]
) -> DataError | None:
    """Returns the error that ends the run, or None if the run may go on; the same on all ranks.

    All ranks must call this function, since it gathers the names of all ranks.

    Args:
        count: The counts, summed over ranks.
        max_bad_fraction: Value of `data.max_bad_fraction`.
        names: Names of this rank's bad images.
    """
    if not past_limit(count, max_bad_fraction):
        return None
    everywhere = [name for rank in distributed.gather_objects(names) for name in rank]
    error = limit_error(count, max_bad_fraction, everywhere)
    error.agreed = True
    return error


def limit_error(count: BadCount, max_bad_fraction: float, names: Iterable[str]) -> DataError:
    """Returns the error for too many bad images, whose message lists at most `MAX_NAMES` names.

    The arguments are those of `agreed_error`, except that the names may be those of all ranks.
    """
    distinct = sorted(set(names))
    named = first_names(distinct, MAX_NAMES) + " (see the log)" * (len(distinct) > MAX_NAMES)
    return DataError(
        f"data.max_bad_fraction: too many images cannot be used; got {count.num_bad} of "
        f"{count.num_tried} samples, expected at most {max_bad_fraction:g} of them "
        f"(of {FEWEST_SAMPLES:,} while fewer were tried): {named}. "
        "Replace or remove these files, or raise --data.max_bad_fraction."
    )

"""The clock of the training steps, which stands still in evaluations and checkpoints.

The process has a single clock, so that no student's speed includes another's evaluations.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_stood = 0.0


def now() -> float:
    """Returns the seconds since a fixed moment, without those for which the clock stood still."""
    return time.perf_counter() - _stood


@contextmanager
def standing() -> Iterator[None]:
    """Stops the clock during the block; blocks are not nested."""
    global _stood
    begin = time.perf_counter()
    try:
        yield
    finally:
        _stood += time.perf_counter() - begin

"""A clock that measures the time of training steps, and is stopped in evaluations and checkpoints.

All students in a process share this clock, so that no student's speed includes the evaluations of
another student.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_stood = 0.0


def now() -> float:
    """Returns the seconds since a fixed moment, without those in which the clock was stopped."""
    return time.perf_counter() - _stood


@contextmanager
def standing() -> Iterator[None]:
    """Stops the clock during the block; such blocks must not be nested."""
    global _stood
    begin = time.perf_counter()
    try:
        yield
    finally:
        _stood += time.perf_counter() - begin

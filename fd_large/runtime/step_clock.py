"""The clock of the training steps, which stands still in evaluations and checkpoints.

It is the process's: among several students nobody's speed has the evaluations of another.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

_stood = 0.0


def now() -> float:
    """Returns the seconds since some moment, without those for which it stood."""
    return time.perf_counter() - _stood


@contextmanager
def standing() -> Iterator[None]:
    """Lets the clock stand; blocks are not nested."""
    global _stood
    begin = time.perf_counter()
    try:
        yield
    finally:
        _stood += time.perf_counter() - begin

"""A wait for a condition, with a limit."""

from __future__ import annotations

import time
from collections.abc import Callable


def until(
    condition: Callable[[], object],
    seconds: float,
    what: str | Callable[[], str],
    *,
    pause: float = 0.02,
) -> None:
    """Returns once a condition holds.

    Args:
        condition: Asked again and again; what it raises ends the wait.
        seconds: When time is over. Generous: it only says that something is stuck.
        what: What did not come, or returns what shows why; asked when time is over.
        pause: Seconds between two looks.

    Raises:
        AssertionError: When time is over.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            told = what if isinstance(what, str) else what()
            raise AssertionError(f"not within {seconds:g} s: {told}")
        time.sleep(pause)

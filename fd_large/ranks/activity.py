"""The current work of this process, displayed by `runtime/display.py`.

Anything that may take longer than a few seconds is recorded as a piece of work. A piece that begins
during another piece is a part of the other. Recording alone displays nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from fd_large.errors import without_secrets

T = TypeVar("T")

_works: list[Work] = []

on_change: list[Callable[[], None]] = []
"""Functions called after every change of the current work, in the thread that made it."""


class Work:
    """A piece of work; it lasts until `end`.

    Args:
        description: The work in words.
        total: Number of units of the work; None if unknown.
        unit: Unit of the count, such as "images"; "" to show a percentage of `total` instead.
        done: Number of units that were finished before this piece of work began.
    """

    def __init__(
        self, description: str, total: float | None = None, unit: str = "", *, done: float = 0
    ) -> None:
        self.what, self.total, self.unit = without_secrets(description), total, unit
        self.done = self._first = done
        self.began = time.monotonic()
        _works.append(self)
        _changed()

    def advance(self, amount: float = 1, description: str | None = None) -> None:
        """Adds `amount` finished units.

        `description` replaces the description of the work, unless it is None or empty.
        """
        self.reach(self.done + amount)
        self.what = without_secrets(description or self.what)

    def reach(self, done: float) -> None:
        """Sets the number of finished units to `done`."""
        self.done = done
        _changed()

    def end(self) -> None:
        """Ends the work, which removes it from the current work."""
        if self in _works:
            _works.remove(self)
            _changed()

    def seconds_left(self, now: float) -> float | None:
        """Returns the remaining seconds at the present speed.

        Args:
            now: Present time, by `time.monotonic`.

        Returns: the seconds, or None if the total is unknown or 0, or no unit was finished since
            this piece of work began.
        """
        fresh = self.done - self._first
        if not self.total or fresh <= 0:
            return None
        return max(0.0, (now - self.began) * (self.total - self.done) / fresh)

    def __str__(self) -> str:
        if self.total and self.unit:
            return f"{self.what}, {self.done:,.0f} of {self.total:,.0f} {self.unit}"
        if self.total:
            return f"{self.what}, {100 * self.done / self.total:.0f}%"
        if self.done and self.unit:
            return f"{self.what}, {self.done:,.0f} {self.unit}"
        return self.what


@contextmanager
def work(description: str, total: float | None = None, unit: str = "") -> Iterator[Work]:
    """Records the code in the `with` block as a piece of work, and yields the piece.

    Args:
        description: The work in words.
        total: Number of units of the work; None if unknown.
        unit: Unit of the count, such as "images"; "" to show a percentage of `total` instead.
    """
    begun = Work(description, total, unit)
    try:
        yield begun
    finally:
        begun.end()


def counted(items: Collection[T], description: str, unit: str) -> Iterator[T]:
    """Yields the items of `items`, and records the loop as a piece of work (`work`).

    The piece counts the finished items.

    Args:
        items: The items, whose number is the total.
        description: The work in words.
        unit: Unit of the count, such as "images".
    """
    with work(description, len(items), unit) as begun:
        for item in items:
            yield item
            begun.advance()


def current() -> tuple[Work, ...]:
    """Returns the pieces of work in progress, the outermost first."""
    return tuple(_works)


def describe(works: tuple[Work, ...], now: float) -> str:
    """Describes nested pieces of work in words, with elapsed and, if known, remaining time.

    Args:
        works: The pieces, the outermost first; at least one.
        now: Present time, by `time.monotonic`.
    """
    text = ": ".join(str(piece) for piece in works)
    left = next((s for piece in works[::-1] if (s := piece.seconds_left(now)) is not None), None)
    text += f"; {clock(now - works[-1].began)} so far"
    return text if left is None else f"{text}, {clock(left)} left"


def clock(seconds: float) -> str:
    """Returns a duration of `seconds` seconds as 0:07, 12:34, 1:02:03 or 3d 04h."""
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}h"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minutes}:{second:02d}"


def _changed() -> None:
    for call in tuple(on_change):
        call()

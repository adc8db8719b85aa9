"""Shows the progress of a command: a bar on a terminal, else a line at least every 30 s.

A thread asks twice a second what the command is doing (`activity`), and draws the bar. During
training nothing is drawn here, since training's own bar (`progress.py`) uses the terminal.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fd_large.ranks import activity
from fd_large.ranks.activity import Work, clock, describe
from fd_large.runtime import terminal

if TYPE_CHECKING:
    from rich.progress import Progress

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 25.0
"""Seconds without a line after which a line is written. With the delays of the thread and of a busy
machine, less than 30 s pass between two lines."""
SECONDS_UNTIL_BAR = 2.0
SECONDS_BETWEEN_LOOKS = 0.5


@contextmanager
def shown(description: str) -> Iterator[None]:
    """Shows the progress of the work in the block; `description` names the work as a whole."""
    # rich is not imported for a block that ends at once.
    live = terminal.out().isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    look: Bar | Lines = Bar() if live else Lines(say)
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            with terminal.drawing:
                look(activity.current(), time.monotonic())

    thread = threading.Thread(target=watch, name="display", daemon=True)
    with activity.work(description):
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            look.close()


def say(text: str) -> None:
    """Shows `text` to the user, by the log if `logs.start` was called, else on stderr."""
    if log.isEnabledFor(logging.INFO):  # `logs.start` was called.
        log.info("%s", text)
    else:
        print(f"{time.strftime('%H:%M:%S')}  {text}", file=terminal.err())


class Lines:
    """Writes a line about the current work if the user has seen no line for some seconds.

    Args:
        say: Function that writes a line to the user.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._said = float("-inf")

    def __call__(self, works: tuple[Work, ...], now: float) -> None:
        """Writes a line about the work, if there is work and no line was shown for some seconds.

        The number of seconds is `SECONDS_BETWEEN_LINES`; they are counted from the last line or, if
        this is later, from the beginning of the outermost work.

        Args:
            works: The current work, from the outermost to the innermost; empty if there is none.
            now: The time, by time.monotonic.
        """
        if not works:
            return
        since = max(self._said, terminal.last_said(), works[0].began)
        if now - since >= SECONDS_BETWEEN_LINES:
            self._said = now
            self._say(describe(works[1:] or works, now))

    def close(self) -> None:
        """Does nothing, since written lines stay."""


class Bar:
    """Draws a progress bar for work that takes longer than `SECONDS_UNTIL_BAR` seconds."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def __call__(self, works: tuple[Work, ...], now: float) -> None:
        """Draws the bar with the progress of the work, or removes the bar.

        The bar is removed if there is no work, or while training's own bar uses the terminal. It is
        not drawn in the first `SECONDS_UNTIL_BAR` seconds of the outermost work.

        Args:
            works: The current work, from the outermost to the innermost; empty if there is none.
            now: The time, by time.monotonic.
        """
        if not works or terminal.is_claimed():
            self.close()
            return
        if now - works[0].began < SECONDS_UNTIL_BAR:
            return
        bar = self._bar = self._bar or self._begin()
        inner = works[-1]
        sized = next((work for work in works[::-1] if work.total), None)
        left = sized.seconds_left(now) if sized else None
        bar.update(
            bar.task_ids[0],
            description=": ".join(map(str, works[1:] or works)),
            total=sized.total if sized else None,
            completed=sized.done if sized else 0,
            time=f"{clock(now - inner.began)}" if left is None else f"{clock(left)} left",
            refresh=True,
        )

    def close(self) -> None:
        """Removes the bar from the terminal."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.stop()

    def _make_room(self) -> None:
        with terminal.drawing:
            self.close()

    def _begin(self) -> Progress:
        from rich.progress import BarColumn, Progress, TextColumn

        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[time]}", style="cyan"),
            console=terminal.console(),
            transient=True,
            auto_refresh=False,
            redirect_stderr=False,
        )
        bar.add_task("", time="")
        bar.start()
        terminal.before_errors.append(self._make_room)
        return bar

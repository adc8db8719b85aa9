"""Reserves the terminal for fd_large's lines, and sends other output of a rank to its log file.

Libraries write to file descriptors 1 and 2 from Python, C++ and child processes. `take` makes
private copies of these descriptors, and `hand_over` redirects descriptors 1 and 2 to the rank's
log. The user then sees only output to the copies. Without `take` (if fd_large is used as a library)
nothing changes. This module does not import torch, so that the command line can show an error at
once.
"""

from __future__ import annotations

import faulthandler
import io
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from fd_large.errors import without_secrets

if TYPE_CHECKING:
    from rich.console import Console

_out: TextIO | None = None
_err: TextIO | None = None
_handed_over = False


before_errors: list[Callable[[], None]] = []
"""Functions that are called before an error is shown, in order to stop a live progress bar."""

COLUMNS_FOR_CONTROL = 5
"""Number of columns that a live bar leaves free on the right, since the terminal's echo of Ctrl-C
would otherwise wrap the line."""

drawing = threading.Lock()
"""Lock that is held by the thread of `display.py` while it draws the progress of a command."""
# Forks wait for it, as a process that is forked in the middle of a line would inherit the
# console's locks.
os.register_at_fork(
    before=drawing.acquire, after_in_parent=drawing.release, after_in_child=drawing.release
)

_said = float("-inf")
_claimed = False


def out() -> TextIO:
    """Returns the stream for output to the user: the private copy of stdout, else sys.stdout."""
    return _out or sys.stdout


def err() -> TextIO:
    """Returns the stream for errors to the user: the private copy of stderr, else sys.stderr."""
    return _err or sys.stderr


class _Closable(io.FileIO):
    """File that drops output from its first failed write on.

    A terminal or pipe may close while a run goes on.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return len(data)


def take() -> None:
    """Makes private copies of descriptors 1 and 2, and shows uncaught errors on the copy of stderr.

    A second call does nothing. Nothing is done either if Python's streams do not use descriptors 1
    and 2, as in a notebook or a test runner.
    """
    global _out, _err
    try:
        plain = (sys.stdout.fileno(), sys.stderr.fileno()) == (1, 2)
    except (OSError, ValueError):
        plain = False
    if _out is not None or not plain:
        return
    _clear_the_line()
    console.cache_clear()
    _out, _err = (
        io.TextIOWrapper(
            io.BufferedWriter(_Closable(os.dup(number), "w")),
            encoding="utf-8",
            errors="replace",
            line_buffering=True,
        )
        for number in (1, 2)
    )
    # After a fatal signal no Python code runs, and this handler writes the stack to the user.
    faulthandler.enable(_err)
    mask_uncaught()


def mask_uncaught() -> None:
    """Masks the secrets of URLs in tracebacks of uncaught errors, in the main and other threads."""
    sys.excepthook = _show_uncaught
    threading.excepthook = lambda uncaught: _show_uncaught(
        uncaught.exc_type, uncaught.exc_value or uncaught.exc_type(), uncaught.exc_traceback
    )


def hand_over(path: Path) -> None:
    """Redirects descriptors 1 and 2 to the end of the log file `path`, which is made if missing.

    Does nothing if `take` was not called.
    """
    global _handed_over
    if _out is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    _handed_over = True
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def give_back() -> None:
    """Undoes `take` and `hand_over`; does nothing without `take`."""
    global _out, _err, _handed_over
    if _out is None or _err is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    for number, stream in ((1, _out), (2, _err)):
        stream.flush()
        os.dup2(stream.fileno(), number)
    faulthandler.disable()
    sys.excepthook, threading.excepthook = sys.__excepthook__, threading.__excepthook__
    for stream in (_out, _err):
        stream.close()
    before_errors.clear()
    _out = _err = None
    _handed_over = False
    console.cache_clear()


def show_error(text: str) -> None:
    """Writes `text`, an error, to the user, and after `hand_over` also to the rank's log.

    Secrets in URLs are masked.
    """
    _clear_the_line()
    text = without_secrets(text)
    if _handed_over:
        print(text, file=sys.stderr)
    print(text, file=err())
    note_said()


def note_said() -> None:
    """Records the present time as the time of the last line shown to the user."""
    global _said
    _said = time.monotonic()


def last_said() -> float:
    """Returns the time (time.monotonic) of the last line shown to the user; -inf before any."""
    return _said


def claim(whether: bool) -> None:
    """Reserves the terminal for training's live bar if `whether` is True, else frees it."""
    global _claimed
    with drawing:
        _claimed = whether
    if whether:
        _clear_the_line()


def is_claimed() -> bool:
    """Whether the terminal is reserved for training's live bar."""
    return _claimed


@cache
def console() -> Console:
    """Returns the process's only rich console, which prints to `out`.

    All output goes through one console, so that a line does not break a live progress bar.
    """
    from rich.console import Console, ConsoleDimensions

    class Plain(Console):
        """A console that never hides the cursor, since a killed run could not show it again."""

        def show_cursor(self, show: bool = True) -> bool:
            return False

        @property
        def is_terminal(self) -> bool:
            # rich would believe the variable FORCE_COLOR, which a notebook sets.
            return self.file.isatty()

        @property
        def size(self) -> ConsoleDimensions:
            width, height = super().size
            return ConsoleDimensions(max(20, width - COLUMNS_FOR_CONTROL), height)

        @size.setter
        def size(self, new: tuple[int, int]) -> None:
            self._width, self._height = new

    # Without a private copy it prints to sys.stdout, as it is at that time. A notebook gets text,
    # too, since rich would make an HTML output of each line.
    return Plain(file=_out, highlight=False, markup=False, emoji=False, force_jupyter=False)


def _clear_the_line() -> None:
    while before_errors:
        before_errors.pop()()


def _show_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    _clear_the_line()
    text = without_secrets("".join(traceback.format_exception(kind, error, trace)).rstrip())
    if _handed_over:
        print(text, file=sys.stderr)
    # After Ctrl-C the user needs no stack; the log keeps it.
    print("interrupted" if issubclass(kind, KeyboardInterrupt) else text, file=err())

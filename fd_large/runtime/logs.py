"""Sends log records to a file for each rank, and some of them to the terminal.

The terminal shows rank 0's records of this package from level INFO on, and only errors of libraries
and of other ranks.
"""

from __future__ import annotations

import logging
from pathlib import Path

from fd_large.errors import printable, without_secrets
from fd_large.ranks import distributed
from fd_large.recipes.file_names import LOGS
from fd_large.runtime import terminal

FILE_ONLY = {"file_only": True}
"""Value of `extra` for a record that goes only to the file, since the user sees its content in
another form or does not need it."""
WHOLE_LINES = {"whole_lines": True}
"""Value of `extra` for a record with a command, whose line is not wrapped so that users can copy
the command."""

_early: list[logging.LogRecord] = []


class _Formatter(logging.Formatter):
    """Formats records and their tracebacks, with the secrets in URLs masked."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


_CLOCK = _Formatter("%(asctime)s  %(message)s", "%H:%M:%S")
# The output of a batch job goes to a file, and may span days.
_DATED = _Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S")


class _Terminal(logging.Handler):
    """Handler that prints fd_large's records and libraries' errors on the terminal.

    The records are printed by the console that also draws the progress bar, so that no line breaks
    the bar.

    Args:
        rank: This rank; of ranks other than 0, only errors are printed, with the rank's number.
    """

    def __init__(self, rank: int) -> None:
        # Warnings are the same on all ranks; an error may be one rank's own.
        super().__init__(logging.INFO if rank == 0 else logging.ERROR)
        self._prefix = f"rank {rank}: " if rank else ""

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "file_only", False):
            return False
        return record.name.split(".")[0] == "fd_large" or record.levelno >= logging.ERROR

    def emit(self, record: logging.LogRecord) -> None:
        try:
            console = terminal.console()
            line = (_CLOCK if console.is_terminal else _DATED).format(record)
            text = printable(self._prefix + line)
            # A terminal breaks lines within words, rich between them; a file has long lines.
            whole = getattr(record, "whole_lines", False) or not console.is_terminal
            console.print(text, soft_wrap=whole)
            terminal.note_said()
        except Exception:
            self.handleError(record)


class _Keep(logging.Handler):
    """Handler that keeps records in memory until the run's folder for the log file is known."""

    def emit(self, record: logging.LogRecord) -> None:
        _early.append(record)


def start(rank: int) -> None:
    """Starts to show records on the terminal, and to keep all records for the file of `set_up`.

    Args:
        rank: This rank; of ranks other than 0, only errors are shown.
    """
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    # Details go to the file; the terminal leaves them out.
    logging.getLogger("fd_large").setLevel(logging.DEBUG)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    _early.clear()
    root.addHandler(_Terminal(rank))
    root.addHandler(_Keep())
    logging.captureWarnings(True)


def set_up(folder: Path) -> None:
    """Sends the kept records and all later ones to logs/rank_N.log in `folder`, the run's folder.

    N is the number of this rank in five digits. If `terminal.take` was called, other output to
    stdout and stderr goes into the same file.
    """
    root = logging.getLogger()
    if not any(isinstance(handler, _Keep) for handler in root.handlers):
        start(distributed.rank())
    logs = folder / LOGS
    logs.mkdir(parents=True, exist_ok=True)
    path = logs / f"rank_{distributed.rank():05d}.log"
    file = logging.FileHandler(path)
    file.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for handler in list(root.handlers):
        if isinstance(handler, _Keep):
            root.removeHandler(handler)
    for record in _early:
        file.handle(record)
    _early.clear()
    root.addHandler(file)
    terminal.hand_over(path)
    # DeepSpeed has a console handler of its own; through the root logger its lines look like ours.
    for name in ("DeepSpeed", "deepspeed"):
        library = logging.getLogger(name)
        for handler in list(library.handlers):
            library.removeHandler(handler)
        library.setLevel(logging.INFO)
        library.propagate = True

"""Functions by which commands print tables and sizes."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fd_large.runtime import terminal

if TYPE_CHECKING:
    from rich.console import Console

# A pipe has no width of its own; names in tables are long.
PIPE_WIDTH = 120


def tables(*, most: int = 1000) -> Console:
    """Returns a console for tables, of at most `most` characters in a line.

    The width is the environment variable COLUMNS, if it is set to a positive number. Otherwise it
    is the width of the terminal, or `PIPE_WIDTH` characters if the output is no terminal.
    """
    from rich.console import Console

    out, columns = terminal.out(), os.environ.get("COLUMNS", "")
    width = int(columns) if columns.isdecimal() else 0
    if not width and out.isatty():
        # rich would ask descriptor 1, which may be a log.
        width = os.get_terminal_size(out.fileno()).columns
    width = min(most, width or PIPE_WIDTH)
    return Console(
        file=out, width=width, highlight=False, markup=False, emoji=False, force_jupyter=False
    )


def show(shown: Iterable[Any], written: Iterable[object]) -> None:
    """Prints tables, or other objects that rich can print, and below them lines, mostly paths."""
    console = tables()
    for table in shown:
        console.print(table)
    for path in written:
        console.print(str(path), soft_wrap=True)


def size(count: float) -> str:
    """Returns `count` bytes as text in kB, MB, GB or TB (powers of 1000), such as "1.5 GB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 1e3:,.1f} kB"

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
    """Returns a console for tables, as wide as the terminal but at most `most` characters.

    If the output is no terminal, the console has `PIPE_WIDTH` characters, or $COLUMNS if set.
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
    """Prints tables, and below them a line for each written file."""
    console = tables()
    for table in shown:
        console.print(table)
    for path in written:
        console.print(str(path), soft_wrap=True)


def size(count: float) -> str:
    """Returns a number of bytes as text with a unit from kB to TB, such as "1.5 GB"."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count / 1e3:,.1f} kB"

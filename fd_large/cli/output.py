"""What commands show: a progress bar and tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from fd_large.runtime import terminal

if TYPE_CHECKING:
    from rich.console import Console

# A pipe has no width of its own; names in tables are long.
PIPE_WIDTH = 120

Advance = Callable[[str, float], None]
"""(what is being done, how much of the whole is newly done)."""


@contextmanager
def bar(total: int) -> Iterator[Advance]:
    """Shows progress: a bar on a terminal, a line for each text elsewhere.

    Args:
        total: The whole work.

    Yields: a function to which finished work is reported.
    """
    console = terminal.console()
    if not console.is_terminal or console.is_dumb_terminal:
        said: set[str] = set()

        def line(text: str, done: float) -> None:
            if text not in said:
                said.add(text)
                console.print(text, soft_wrap=True)

        yield line
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, expand=True, refresh_per_second=2) as shown:
        task = shown.add_task("", total=total)
        yield lambda text, done: shown.update(task, description=text, advance=done)


def tables(*, most: int = 1000) -> Console:
    """Returns a console for tables, as wide as the terminal and at most so many columns."""
    from rich.console import Console

    out, width = terminal.out(), int(os.environ.get("COLUMNS", 0))
    if not width and out.isatty():
        # rich would ask descriptor 1, which may be a log.
        width = os.get_terminal_size(out.fileno()).columns
    width = min(most, width or PIPE_WIDTH)
    return Console(file=out, width=width, highlight=False, markup=False, emoji=False)

"""Writes OUT/report.html of `evaluate`, with tables and plots of the results."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fd_large.report import html


def write_evaluation_page(
    path: Path,
    title: str,
    tables: Iterable[Any],
    pictures: Sequence[Path],
    *,
    facts: Iterable[tuple[str, object]] = (),
    below: str = "",
) -> Path:
    """Writes the page of a measurement; returns the page's path.

    Args:
        path: The file.
        title: Title of the measurement.
        tables: The tables of rich that the command prints.
        pictures: Paths of the drawn plots.
        facts: Settings of the measurement, as pairs (label, value).
        below: Line below the title.
    """
    return html.write(
        path,
        title,
        (
            *(html.section(str(table.title or ""), *_parts(table)) for table in tables),
            html.section(
                "Pictures", *(html.picture(picture, _words(picture)) for picture in pictures)
            ),
            html.section("How it was measured", html.table([(k, str(v)) for k, v in facts])),
        ),
        below=below,
    )


def _parts(table: Any) -> list[str]:
    """Returns the HTML of `table`, a table of rich, and of each line of its caption."""
    rows = zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)
    shown = html.table(
        list(rows),
        head=[str(column.header) for column in table.columns],
        right=[column.justify == "right" for column in table.columns],
    )
    return [shown, *map(html.paragraph, str(table.caption or "").splitlines())]


def _words(path: Path) -> str:
    return path.stem.replace("_", " ")

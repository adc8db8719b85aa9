"""Reads the lines of a run's metrics.jsonl and evaluations.jsonl, some of which may be damaged."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

from fd_large.files import kind_of, parse_json

_MOST_STEPS = 1 << 53
_END_BYTES = 1 << 16


class Line(NamedTuple):
    """Line of a .jsonl file.

    Attributes:
        number: Line number from 1, or -1 if unknown.
        raw: Bytes of the line.
        row: The parsed object, or None if the line is damaged.
    """

    number: int
    raw: bytes
    row: dict[str, Any] | None


def lines_of(path: Path) -> list[Line]:
    """Returns the lines of `path`, a run's .jsonl file; [] if the file does not exist.

    A line is undamaged if it is a JSON object whose entry "update" is a number of steps, followed
    by a newline.
    """
    raw = path.read_bytes().splitlines(keepends=True) if kind_of(path) == "file" else []
    return [Line(number, line, _row(line)) for number, line in enumerate(raw, 1)]


def newest_line(path: Path) -> list[Line]:
    """Returns a list with the last undamaged line of the .jsonl file `path`.

    Only the last 64 kB of the file are read. The very last line may be incomplete, if the run is
    running or was killed; the line before it is then returned. The result is [] if the file does
    not exist or has no undamaged line there.
    """
    if kind_of(path) != "file":
        return []
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_BYTES))
        lines = file.read(_END_BYTES).splitlines(keepends=True)
    rows = ((line, _row(line)) for line in reversed(lines))
    return next(([Line(-1, line, row)] for line, row in rows if row is not None), [])


def numbers_of(lines: list[Line]) -> str:
    """Returns the numbers of one or more lines as text, "line 3" or "lines 3, 5"."""
    numbers = ", ".join(str(line.number) for line in lines)
    return f"line{'s' if len(lines) > 1 else ''} {numbers}"


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = parse_json(line)
    except ValueError:
        return None
    update = row.get("update") if isinstance(row, dict) else None
    is_row = type(update) is int and 0 <= update < _MOST_STEPS and line.endswith(b"\n")
    return row if is_row else None

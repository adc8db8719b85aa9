"""Files that a reader sees whole or not at all: written aside, flushed, renamed. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; at the end flushes that file and renames it."""
    aside = path.with_name(path.name + ".part")
    yield aside
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in place of one that may be there."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=1) + "\n")

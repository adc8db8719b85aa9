"""Files that a reader sees whole or not at all: written aside, flushed, renamed. No torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fd_large.errors import ConfigError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; at the end flushes that file and renames it."""
    aside = path.with_name(path.name + ".part")
    yield aside
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


def out_folder(out: str | Path) -> Path:
    """Makes the folder that a command's --out names, once there is something to write.

    Raises: ConfigError: if it cannot be one.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--out: cannot be used; got {error}, expected a folder that can be written. Choose "
            "another."
        ) from error
    return folder


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file in place of one that may be there."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(value, indent=1) + "\n")

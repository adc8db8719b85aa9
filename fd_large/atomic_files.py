"""Files that a reader sees whole or not at all: written aside, flushed, renamed. No torch.

And what passes on a file system of many machines: errors that are tried again, not believed.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fd_large.errors import ConfigError, StorageError

log = logging.getLogger(__name__)

T = TypeVar("T")

PAUSES = (1.0, 3.0, 9.0)
"""Seconds between the tries: a server that is busy or fails over answers within some of them."""
PASSING = {
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EINTR,
    errno.EBUSY,
    errno.ENOLCK,
    errno.EPROTO,
    errno.EREMOTEIO,
    # Lustre's words for a client that its server has thrown out, and that connects again.
    errno.ESHUTDOWN,
    errno.ENOTCONN,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
}

PARTIAL = ".partial-"
"""What a name begins with that a process gives to what it writes aside, beside those of others."""
STALE_SECONDS = 24 * 3600
"""So long after its last change, what is aside was left by a process that was killed."""


def retried(action: Callable[[], T], what: object) -> T:
    """Does something with files, again after a pause where the error is one that passes.

    Args:
        action: What can be done again from its beginning.
        what: The file or folder, for messages.

    Raises:
        OSError: At once, if it is of another kind: no such file, no permission, a full disk.
        StorageError: If the error does not pass.
    """
    for pause in PAUSES:
        try:
            return action()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            log.warning("%s: %s; tried again in %g s", what, error.strerror, pause)
            time.sleep(pause)
    try:
        return action()
    except OSError as error:
        if error.errno not in PASSING:
            raise
        raise StorageError(
            f"{what}: the file system does not answer; got {error.strerror} {len(PAUSES) + 1} "
            "times, expected an answer. What is stored there stays: start the same command again "
            "once the file system is well."
        ) from error


def check_new(path: Path, *, where: str) -> None:
    """Refuses a name at which something stands.

    Raises: ConfigError: if it does.
    """
    if path.exists():
        raise ConfigError(
            f"{where}: {path}: something is there already; got a "
            f"{'folder' if path.is_dir() else 'file'}, expected a new name. Move it, or name "
            "another."
        )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; at the end flushes that file and renames it."""
    aside = path.with_name(path.name + ".part")
    yield aside
    with aside.open("rb") as file:
        os.fsync(file.fileno())
    aside.replace(path)


@contextmanager
def new_folder(out: Path, *, where: str) -> Iterator[Path]:
    """Gives a folder to write into, which appears at `out` once the block has ended well.

    Args:
        out: A name at which nothing stands.
        where: The command, for messages.

    Raises: ConfigError: if something stands at `out`, or it cannot be written.
    """
    check_new(out, where=where)
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(out)
    except OSError as error:
        raise ConfigError(
            f"{where}: {out}: cannot be written; got {error}, expected a place with room for "
            "the folder. Choose another."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


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

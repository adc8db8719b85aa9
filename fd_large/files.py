"""Access to files and paths for the rest of the package. Imports no torch.

A file is written under a temporary name, flushed and renamed, so that a reader sees all of it or
nothing. An action is repeated after an error that is transient on a network file system. Every
other error of the file system becomes one sentence (`unusable`), and JSON is read within bounds of
size and depth.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar

from fd_large.errors import ConfigError, FDError, StorageError, without_secrets

log = logging.getLogger(__name__)

T = TypeVar("T")

PAUSES = (1.0, 3.0, 9.0)
"""Seconds between attempts, within which a server that is busy or fails over answers again."""
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
    # Lustre's error for a client that its server has evicted, and that connects again.
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

REFUSED = {
    errno.EACCES: "Get permission (chmod, or ask the owner), or name another path.",
    errno.EPERM: "Get permission (chmod, or ask the owner), or name another path.",
    errno.ENAMETOOLONG: "Name a shorter path: each part has at most 255 bytes.",
    errno.ENOENT: "Correct the path.",
    errno.ENOTDIR: "Correct the path: a part of it is a file.",
    errno.EISDIR: "Name a file.",
    errno.ENOTEMPTY: "Name an empty folder or a new path.",
    errno.EEXIST: "Name another path, or move what is there.",
    errno.ELOOP: "Correct the link, which leads back to itself.",
    errno.ENXIO: "Name a file or a folder.",
    errno.ENODEV: "Name a file or a folder.",
    errno.EROFS: "Name a path on a file system that can be written.",
    errno.ENOSPC: "Make room, or name a path on another file system.",
    errno.EDQUOT: "Make room, or name a path on another file system.",
    errno.EFBIG: "Name a path on a file system that takes larger files.",
}
"""Remedies by error number, for a path of the user's that the file system refuses."""

JSON_BYTES, JSON_DEPTH = 64 << 20, 100
"""Bounds of a JSON file in bytes and in depth, which no file of this package reaches."""

_MOST_DIGITS = 40
"""Number of digits up to which Python parses an integer; a longer one may exceed a float."""
_LONG = re.compile(rf"\d{{{_MOST_DIGITS}}}")
_LONG_BYTES = re.compile(_LONG.pattern.encode())

PARTIAL = ".partial-"
"""Prefix of the names of files that are still being written, in a folder shared by processes."""
STALE_SECONDS = 24 * 3600
"""Age in seconds at which a partial file counts as left behind by a killed process."""


def retried(action: Callable[[], T], path: object) -> T:
    """Runs an action on files, and repeats it after a pause if its error is transient.

    Args:
        action: Function that can be called again after it failed.
        path: The file or folder, for messages.

    Raises:
        OSError: At once for other errors, such as a missing file, no permission or a full disk.
        StorageError: If the last attempt fails with a transient error.
    """
    for pause in PAUSES:
        try:
            return action()
        except OSError as error:
            if error.errno not in PASSING:
                raise
            log.warning("%s: %s; trying again in %g s", path, error.strerror, pause)
            time.sleep(pause)
    try:
        return action()
    except OSError as error:
        if error.errno not in PASSING:
            raise
        raise StorageError(
            f"{path}: the file system does not answer; got {error.strerror} {len(PAUSES) + 1} "
            "times, expected an answer. Stored files are kept: start the same command again once "
            "the file system answers."
        ) from error


def unusable(
    where: str, error: OSError, path: object = None, *, of: type[FDError] = ConfigError
) -> FDError:
    """Returns an error whose text says in a sentence why the file system refused a path.

    Args:
        where: The field that the user set, or the command; "" if unknown.
        error: The error that the file system raised.
        path: The path; None to take the path from `error`.
        of: Class of the returned error. If `error` is transient, the class is StorageError instead.
    """
    named = error.filename if path is None else path
    name = os.fsdecode(named) if isinstance(named, (str, bytes, os.PathLike)) else "a file"
    start = _start(where, name)
    reason = (error.strerror or type(error).__name__).lower()
    if error.errno in PASSING:
        return StorageError(
            f"{start}: the file system does not answer; got {reason}, expected an answer. Start "
            "the same command again once the file system answers."
        )
    remedy = REFUSED.get(error.errno or 0, "Name another path.")
    return of(f"{start}: cannot be used; got {reason}, expected a path that can be used. {remedy}")


def _start(where: str, name: str) -> str:
    """Returns the beginning of a message about a path, "WHERE: NAME".

    Args:
        where: The field that the user set, or the command; if "", the result is NAME alone.
        name: The path, of which the middle is left out if it is long.
    """
    shown = name if len(name) <= 300 else f"{name[:200]}...{name[-60:]}"
    return f"{where}: {shown}".removeprefix(": ")


def kind_of(
    path: str | os.PathLike[str], *, where: str = "", of: type[FDError] = ConfigError
) -> Literal["file", "folder", "other"] | None:
    """Returns what `path` leads to, with links followed, or None if nothing exists there.

    Use this instead of `Path.exists` and similar methods, which raise or hide errors of the file
    system.

    Args:
        path: The path.
        where: The field that the user set, or the command; "" if unknown.
        of: Class of the raised error.

    Returns: "file", "folder", "other" (a pipe, a device or a socket), or None.

    Raises:
        FDError: If the file system refuses the path, as for a folder without permission or a name
            that is too long; or if the path is empty or contains a NUL.
    """
    if not os.fspath(path):
        raise of(
            f"{where or 'a path'}: empty; got '', expected the path of a file or a folder. "
            "Give the path."
        )
    try:
        mode = retried(lambda: os.stat(path), path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unusable(where, error, path, of=of) from error
    except ValueError as error:  # A NUL in the path.
        start = _start(where, repr(os.fspath(path)))
        raise of(
            f"{start}: cannot be used; got {error}, expected a path. Correct the path."
        ) from error
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def parse_json(
    text: str | bytes,
    *,
    finite: bool = False,
    long_as_float: bool = False,
    **hooks: Callable[[Any], Any],
) -> Any:
    """Returns the value of a JSON text.

    Args:
        text: The text; bytes are UTF-8.
        finite: Whether to refuse NaN and infinities, which Python writes although JSON has none.
        long_as_float: Whether a whole number too long for a float becomes infinity; otherwise it
            is refused.
        hooks: `object_hook` or `object_pairs_hook` of `json.loads`.

    Raises: ValueError: with a one-line reason, if the text is not JSON or nested too deeply.
    """
    number = _finite if finite else None
    # Asked for rarely, since it takes time at each number.
    digits = _LONG if isinstance(text, str) else _LONG_BYTES
    whole = _whole_or_float if long_as_float else _whole
    try:
        value = json.loads(
            text,
            parse_int=whole if digits.search(text) else None,  # type: ignore[arg-type]
            parse_float=number,
            parse_constant=number,
            **hooks,
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    # Depth is bounded, since code that walks through the value later recurses.
    inside = [value] if isinstance(value, dict | list) and not hooks else []
    for _ in range(JSON_DEPTH):
        inside = [
            child
            for container in inside
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, dict | list)
        ]
        if not inside:
            return value
    raise ValueError("nested too deeply")


def read_bytes(
    path: str | Path,
    *,
    where: str = "",
    of: type[FDError] = ConfigError,
    remedy: str = "Name a file.",
    max_bytes: int = JSON_BYTES,
) -> bytes:
    """Returns the bytes of a file; a pipe or a device is refused, and not waited for.

    Args:
        path: The file.
        where: The field that the user set, or the command; "" if unknown.
        of: Class of the raised error.
        remedy: Remedy in the message if the path is not a file, or the file is too large.
        max_bytes: Largest size of the file in bytes.

    Raises: FDError: if the file is missing, cannot be read, or is larger than `max_bytes`.
    """
    kind = kind_of(path, where=where, of=of)
    try:
        if kind != "file":
            raise ValueError({None: "no such file", "folder": "a folder"}.get(kind, "no file"))
        data = retried(lambda: _first_bytes(Path(path), max_bytes + 1), path)
        if len(data) > max_bytes:
            raise ValueError(f"more than {max_bytes >> 20} MB")
    except OSError as error:
        raise unusable(where, error, path, of=of) from error
    except ValueError as error:
        start = _start(where, os.fspath(path))
        raise of(f"{start}: cannot be read; got {error}, expected a file. {remedy}") from error
    return data


def read_json(
    path: Path,
    *,
    where: str = "",
    holds: type | tuple[type, ...] = object,
    remedy: str = "Restore it, or remove it.",
    of: type[FDError] = ConfigError,
    finite: bool = False,
    long_as_float: bool = False,
    max_bytes: int = JSON_BYTES,
    max_values: int | None = None,
    **hooks: Callable[[Any], Any],
) -> Any:
    """Returns the value of a JSON file, read within bounds of memory and time.

    Args:
        path: The file.
        where: The field that the user set, or the command; "" if unknown.
        holds: Expected type of the value, such as dict or list.
        remedy: Remedy in the message for a damaged file.
        of: Class of the raised error.
        finite: Whether to refuse NaN and infinities.
        long_as_float: Whether a whole number too long for a float becomes infinity; otherwise it
            is refused.
        max_bytes: Largest size of the file in bytes.
        max_values: Largest number of values in the file; None for any number.
        hooks: `object_hook` or `object_pairs_hook` of `json.loads`.

    Raises: FDError: if the file is missing, unreadable or too large, or its value has another type.
    """
    text = read_bytes(path, where=where, of=of, remedy=remedy, max_bytes=max_bytes)
    try:
        if max_values and sum(map(text.count, (b",", b"[", b"{"))) > max_values:
            raise ValueError(f"more than {max_values:,} values")
        value = parse_json(text, finite=finite, long_as_float=long_as_float, **hooks)
        if not isinstance(value, holds):
            raise ValueError(f"{json.dumps(value)[:40]}")
    except ValueError as error:
        expected = {dict: "a JSON object", list: "a JSON list"}.get(holds, "JSON")  # type: ignore[arg-type]
        raise of(
            f"{_start(where, str(path))}: damaged or not JSON; got {str(error)[:200]}, expected "
            f"{expected}. {remedy}"
        ) from error
    return value


def json_object(path: Path) -> dict[str, Any]:
    """Returns the object in the JSON file `path` as a dict.

    The dict is empty if the file is missing, damaged, unreadable or holds no object.
    """
    with suppress(FDError):
        return read_json(path, holds=dict)
    return {}


def _first_bytes(path: Path, number: int) -> bytes:
    with path.open("rb") as file:
        # Python allocates as many bytes as a read asks for.
        return file.read(min(number, os.fstat(file.fileno()).st_size + 1))


def _whole(text: str) -> int:
    if len(text) > _MOST_DIGITS:
        raise ValueError(f"{text[:20]}... of {len(text)} digits for a number")
    return int(text)


def _whole_or_float(text: str) -> float:
    return float(text) if len(text) > _MOST_DIGITS else int(text)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} for a number")
    return number


def check_out(
    out: str | Path, *, where: str, holds: Literal["nothing", "file", "folder"] = "nothing"
) -> Path:
    """Checks, before a command works, that its results can be written; leaves nothing behind.

    Args:
        out: The path of the results.
        where: The flag or the argument, for messages.
        holds: What may already exist at the path.

    Raises: ConfigError: if something else exists at the path, or no file can be written there.
    """
    kind = kind_of(out, where=where)
    out = Path(out)
    if kind not in (None, holds) or (kind is None and out.is_symlink()):
        got = f"a {kind}" if kind else "a link that leads nowhere"
        expected = f"a {holds} or a new name" if holds != "nothing" else "a new name"
        raise ConfigError(
            f"{where}: {out}: already exists; got {got}, expected {expected}. "
            "Move what is there, or choose another name."
        )
    places = [out] if kind == "folder" else [*out.absolute().parents]
    folder = next(place for place in places if kind_of(place, where=where))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"tried")
            file.flush()
    except OSError as error:
        raise unusable(where, error, out) from error
    return out


def unlinked(path: Path) -> Path:
    """Removes `path` if it is a symbolic link; returns `path` in every case.

    Writing through a link, in a folder that came from elsewhere, could overwrite any file of the
    user's.
    """
    if path.is_symlink():
        path.unlink()
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, for the block to write a file.

    After the block, the file is flushed to the disk and renamed to `path`. If the block fails, the
    temporary file is removed and `path` stays as it was.
    """
    aside = unlinked(path.with_name(path.name + ".part"))
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


@contextmanager
def new_folder(out: Path, *, where: str) -> Iterator[Path]:
    """Yields a temporary folder, which is renamed to `out` if the block succeeds, or else removed.

    Args:
        out: A path that does not exist yet.
        where: The command, for messages.

    Raises: ConfigError: if `out` exists or cannot be written.
    """
    check_out(out, where=where)
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        part.rename(out)
    except OSError as error:
        raise unusable(where, error, out) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def out_folder(out: str | Path) -> Path:
    """Creates `out`, the folder of a command's --out, if it is missing; returns its path.

    Raises: ConfigError: if the folder cannot be created or written.
    """
    folder = check_out(out, where="--out", holds="folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unusable("--out", error, folder) from error
    return folder


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Writes or replaces a JSON file atomically.

    Args:
        path: The file.
        value: The value to write.
        private: Whether only the file's owner may read and write it. A file with a secret (a URL
            with user, password or query) is always private.
    """
    text = json.dumps(value, indent=1) + "\n"
    with replacing(path) as aside:
        if private or without_secrets(text) != text:
            aside.unlink(missing_ok=True)
            aside.touch(0o600)
        aside.write_text(text)

"""The user's list of code that may run again without being named. Imports no torch.

A command line that names or allows the user's own code adds the code's name and hash to the list,
so that the same run can be resumed without flags. The list is the file
`$XDG_STATE_HOME/fd_large/allowed_code.json`, or `$HOME/.local/state/fd_large/allowed_code.json` if
XDG_STATE_HOME is not set: outside of every run folder, since a run folder may come from others. The
list is used only if nobody but the user can write it. If neither variable is an absolute path,
there is no list, and each command must name its code.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fd_large.files import parse_json, write_json

log = logging.getLogger(__name__)

Entries = dict[str, dict[str, str]]
"""{name: {SHA-256 of the file: the file's absolute path}}, the newest last."""

FOLDER = "fd_large"
LIST = "allowed_code.json"
NAMES, HASHES = 1_000, 20
"""Largest numbers of names in the list, and of hashes for each name."""
_BYTES = 16 << 20
_TURN_SECONDS = 2.0


def place() -> Path | None:
    """Returns the path of the list, or None if there can be no list.

    The path is below XDG_STATE_HOME if this variable holds an absolute path, and otherwise below
    HOME. The result is None if HOME holds no absolute path either.
    """
    state, home = os.environ.get("XDG_STATE_HOME", ""), os.environ.get("HOME", "")
    if os.path.isabs(state):  # The XDG specification says to ignore a relative path.
        return Path(state) / FOLDER / LIST
    return Path(home) / ".local" / "state" / FOLDER / LIST if os.path.isabs(home) else None


def read() -> tuple[Entries, str]:
    """Returns the entries of the list, and the reason why the list is not trusted.

    The entries are {name of the code: {SHA-256 of its file: path of the file}}. They are {} for a
    missing list and for a list that is not trusted. The reason is "" for a trusted or a missing
    list. An error of the file system is returned as the reason, and not raised.
    """
    path = place()
    if path is None:
        return {}, ""
    try:
        entries, reason = _believed(path)
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, _sentence(
            path, (error.strerror or str(error)).lower(), "a list that can be read"
        )
    return entries, reason


def add(name: str, digest: str, file: Path) -> None:
    """Adds the name and the hash of code to the list; does nothing if the list has no path.

    Concurrent processes write in turn; on a file system without locks, the last write wins.
    An error of the file system is logged, and not raised.

    Args:
        name: The absolute name, `module:...`.
        digest: SHA-256 of the file.
        file: The file's absolute path.
    """
    path = place()
    if path is None:
        return
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _turn(path.parent):
            entries, reason = read()
            if reason and not _may_replace(path):
                log.warning("%s", reason)
            elif entries.get(name, {}).get(digest) != str(file):
                hashes = {**entries.pop(name, {}), digest: str(file)}
                entries[name] = dict([*hashes.items()][-HASHES:])
                write_json(path, dict([*entries.items()][-NAMES:]), private=True)
    except OSError as error:
        log.info("%s: not written (%s): the next start must name its code again", path, error)


# ------------------------------------------------------------------------------------------------


def _believed(path: Path) -> tuple[Entries, str]:
    folder = path.parent.lstat()
    if reason := _open_to_others(folder, is_folder=True):
        return {}, _sentence(path.parent, reason, "a folder that you alone can write (mode 0700)")
    # Links are refused, since others may have made them, and an open does not wait for a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if reason := _open_to_others(os.fstat(descriptor), is_folder=False):
            return {}, _sentence(path, reason, "a file that you alone can write (mode 0600)")
        text = file.read(_BYTES + 1)
    try:
        if len(text) > _BYTES:
            raise ValueError(f"more than {_BYTES >> 20} MB")
        entries = parse_json(text)
        if not _is_list(entries):
            raise ValueError("JSON of another form")
    except ValueError as error:
        return {}, _sentence(path, str(error)[:100], "a list that fd_large wrote")
    return entries, ""


def _sentence(path: Path, got: str, expected: str) -> str:
    return (
        f"{path}: the list of code that you have allowed is ignored; got {got}, expected "
        f"{expected}. Remove this file or folder, or correct it after reading it."
    )


def _open_to_others(status: os.stat_result, *, is_folder: bool) -> str:
    """Returns the reason not to trust a file or folder, or "" if only the user can write it.

    The reason is that it is not of the expected kind, belongs to another user, or can be written
    by the group or by all users.

    Args:
        status: Result of a stat call for the file or folder.
        is_folder: Whether a folder is expected; if False, a regular file is expected.
    """
    if not (stat.S_ISDIR if is_folder else stat.S_ISREG)(status.st_mode):
        return f"not a {'folder' if is_folder else 'file'}"
    if status.st_uid != os.geteuid():
        return f"owner {status.st_uid}"
    return f"mode {stat.S_IMODE(status.st_mode):04o}" if status.st_mode & 0o022 else ""


def _is_list(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(hashes, dict) and all(isinstance(file, str) for file in hashes.values())
        for hashes in value.values()
    )


def _may_replace(path: Path) -> bool:
    """Whether nobody but the user can write the list `path` and its folder.

    If so, and the list is still not trusted, then its content is damaged, and it may be replaced.
    The result is False if the list or its folder does not exist.
    """
    with suppress(OSError):
        others = _open_to_others(path.parent.lstat(), is_folder=True)
        return not (others or _open_to_others(path.lstat(), is_folder=False))
    return False


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Holds a lock on `folder`, in which the list is, during the block.

    The block runs without the lock if another process still holds it after two seconds, or if the
    file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        until = time.monotonic() + _TURN_SECONDS
        while time.monotonic() < until:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:
                break
        yield
    finally:
        os.close(descriptor)

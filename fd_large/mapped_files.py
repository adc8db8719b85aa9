"""Clear errors if a memory-mapped weights file changes while it is used. Imports no torch.

The pages of a mapped file are the file itself. Overwriting the file changes a model in use;
truncating it removes pages, and an access to them gets SIGBUS from the system. Renaming another
file over it is harmless, since the old file stays mapped.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from fd_large.errors import Exit, WeightsError
from fd_large.ranks import failures
from fd_large.ranks.processes import briefly

log = logging.getLogger(__name__)


class _Stamp(NamedTuple):
    """State of a file when it was opened.

    Attributes:
        device: Number of the device that holds the file.
        inode: Number of the file's inode.
        size: Size in bytes.
        changed: Time of the last modification, in ns since 1970.
    """

    device: int
    inode: int
    size: int
    changed: int

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.changed / 1e9))
        return f"{self.size} bytes, written {when}"


_opened: dict[Path, _Stamp] = {}
_held: WeakKeyDictionary[object, tuple[Path, ...]] = WeakKeyDictionary()
_SIGNAL_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_handler: ctypes._FuncPointer | None = None
_handler_before: int | None = None


def opening(path: Path) -> None:
    """Records the file `path`, which is about to be mapped, and installs the handler of SIGBUS.

    From then on, an access to a removed page of the file ends the process with a clear error.

    Raises: OSError: if the file does not exist.
    """
    _opened[path] = _stamp(path)
    _catch()


def hold(model: object, paths: Iterable[Path]) -> None:
    """Records, for `check`, which mapped files hold a model's weights.

    Args:
        model: The model. The record is dropped when the model is garbage-collected.
        paths: The files; those that were not given to `opening` are left out.
    """
    _held[model] = tuple(path for path in paths if path in _opened)


def check(model: object) -> None:
    """Raises an error if a file of a model's weights was changed in place since it was opened.

    The files are those that `hold` has recorded for `model`. The check makes a stat call for each,
    whose result network file systems cache for some seconds.

    Raises: WeightsError: with exit code 3, on this rank alone.
    """
    for path in _held.get(model, ()):
        if sentence := _changed(path, in_place=True):
            error = WeightsError(sentence)
            error.exit_code, error.rank_local = Exit.LOOK, True
            raise error


def _stamp(path: Path) -> _Stamp:
    status = os.stat(path)
    return _Stamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def _changed(path: Path, *, in_place: bool) -> str:
    """Returns a message if a file has changed since it was opened, or "" if it has not.

    Args:
        path: The file.
        in_place: Whether to count only a change of the same inode. A missing file, or another file
            under the same name, then gives "".
    """
    before = _opened[path]
    try:
        now = _stamp(path)
    except OSError as error:
        return "" if in_place else _sentence(path, error.strerror or str(error), before)
    if now == before or (in_place and now[:2] != before[:2]):
        return ""
    return _sentence(path, str(now), before)


def _sentence(path: Path, got: str, before: _Stamp) -> str:
    return (
        f"weights: {path}: the file was cut or written over while its weights were in use; got "
        f"{got}, expected {before}. No machine is at fault. Restore the file, then start the same "
        "command again, which goes on from its last checkpoint. Write new weights under a new "
        "name, or rename the new file over the old one."
    )


def _catch() -> None:
    """Installs `_on_bus_error` as the C handler of SIGBUS, since Python's handlers run too late."""
    global _handler, _handler_before
    if _handler is not None:
        return
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    _handler = _SIGNAL_HANDLER(_on_bus_error)
    _handler_before = libc.signal(signal.SIGBUS, ctypes.cast(_handler, ctypes.c_void_p))


def _on_bus_error(number: int) -> None:
    """Ends the process if a mapped file has changed; otherwise restores the previous handler.

    With the previous handler, the access to memory is repeated, and the signal comes again. The
    signal comes from an access to memory, so the thread holds no lock of malloc or Python.

    Args:
        number: Number of the signal, SIGBUS.
    """
    sentences = [text for path in list(_opened) if (text := _changed(path, in_place=False))]
    if not sentences:
        ctypes.CDLL(None).signal(number, ctypes.c_void_p(_handler_before))
        return  # The access is tried again.
    try:
        failures.tell(Exit.LOOK, sentences[0])
        briefly(_last_words, sentences[0], seconds=failures.SECONDS_FOR_LAST_WORDS)
        failures.kill_workers()
    finally:
        os._exit(Exit.LOOK)


def _last_words(sentence: str) -> None:
    log.error("%s", sentence)
    for write in failures.last_words:
        write(sentence)

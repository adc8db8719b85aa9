"""The file operations of this process under a folder: counted, and some of them made to fail.

Python's own calls are replaced (os.*, io.open and what its files do), so that it sees what the
package does by them, in all threads; what a library does in C is not seen.
"""

from __future__ import annotations

import builtins
import io
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

_FOLDERS = ("listdir", "scandir", "mkdir", "rmdir", "unlink", "remove", "rename", "replace")
_STATES = ("stat", "lstat", "fstat", "access", "readlink", "utime", "chmod", "truncate")
_BYTES = ("open", "read", "pread", "preadv", "write", "writev", "ftruncate", "fsync", "close")
_CALLS = (*_FOLDERS, *_STATES, *_BYTES)
_OF_FILES = ("read", "readline", "readlines", "write", "writelines", "flush")
Fails = Callable[["Operation"], int | None]
"""An operation -> the errno that it fails with, or None."""


class Operation:
    """One call.

    Attributes:
        number: How many came before it.
        name: As of the function of os, or of a file's method.
        path: What it was about.
        done: Whether it has been carried out: it is asked once before and once after, since an
            answer may be lost as well.
    """

    def __init__(self, number: int, name: str, path: Path) -> None:
        self.number, self.name, self.path, self.done = number, name, path, False

    def __repr__(self) -> str:
        return f"{self.number}: {self.name} {self.path.name}{', done' if self.done else ''}"


class Watched:
    """What was done.

    Attributes:
        operations: In order.
        bytes_read: Sum over all files.
    """

    def __init__(self, folder: Path, fails: Fails) -> None:
        self._folder, self._fails = str(folder), fails
        self._paths: dict[int, str] = {}
        self._lock = threading.RLock()
        self.operations: list[Operation] = []
        self.bytes_read = 0

    def counts(self) -> Counter[str]:
        """Returns how often each was done."""
        return Counter(operation.name for operation in self.operations)

    def path(self, given: Any, dir_fd: int | None = None) -> str | None:
        """The path under the folder that an argument means; None for another."""
        if isinstance(given, int):
            return self._paths.get(given)
        with suppress(TypeError):
            text = os.fsdecode(given)
            if dir_fd is not None and dir_fd in self._paths:
                text = os.path.join(self._paths[dir_fd], text)
            if text.startswith(self._folder):
                return text
        return None

    def do(self, name: str, path: str, action: Callable[[], Any]) -> Any:
        """Counts an operation, carries it out, and fails where it is to."""
        with self._lock:
            operation = Operation(len(self.operations), name, Path(path))
            self.operations.append(operation)
        self._fail(operation)
        value = action()
        operation.done = True
        if name in ("read", "pread", "preadv", "readline"):
            self.bytes_read += value if isinstance(value, int) else len(value)
        try:
            self._fail(operation)
        except OSError:
            # Its answer is lost, and with it the descriptor.
            if name == "open":
                value.close() if hasattr(value, "close") else os.close(value)
            raise
        if name == "open":
            self._paths[value if isinstance(value, int) else value.fileno()] = path
        return value

    def forget(self, descriptor: int) -> None:
        """A descriptor is closed; its number may come again."""
        self._paths.pop(descriptor, None)

    def _fail(self, operation: Operation) -> None:
        if number := self._fails(operation):
            raise OSError(number, os.strerror(number), str(operation.path))


class _File:
    """A file of io.open whose reads and writes count."""

    def __init__(self, file: Any, path: str, watched: Watched) -> None:
        self._file, self._path, self._watched = file, path, watched

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._file, name)
        if name not in _OF_FILES:
            return value
        return lambda *given: self._watched.do(name, self._path, lambda: value(*given))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        if not self._file.closed:
            self._watched.forget(self._file.fileno())
        self._file.close()


@contextmanager
def watching(folder: Path, fails: Fails = lambda operation: None) -> Iterator[Watched]:
    """Watches the operations of the body on paths under a folder.

    Args:
        folder: As the package will name it.
        fails: Asked before and after each operation. `close` cannot fail: it would leak.
    """
    watched = Watched(folder, fails)

    def replacement(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any, **named: Any) -> Any:
            path = watched.path(given[0] if given else named.get("path", "."), named.get("dir_fd"))
            if path is None:
                return real(*given, **named)
            if name == "close":
                watched.forget(given[0])
                return real(*given)
            return watched.do(name, path, lambda: real(*given, **named))

        return call

    real_open = io.open

    def opened(file: Any, *given: Any, **named: Any) -> Any:
        path = None if isinstance(file, int) else watched.path(file)
        if path is None:
            return real_open(file, *given, **named)
        return _File(
            watched.do("open", path, lambda: real_open(file, *given, **named)), path, watched
        )

    real = {name: getattr(os, name) for name in _CALLS}
    real["fsync"] = lambda descriptor: None  # Hundreds of them would take minutes.
    with (
        patch.multiple(os, **{name: replacement(name, call) for name, call in real.items()}),
        patch.object(io, "open", opened),
        patch.object(builtins, "open", opened),
    ):
        yield watched

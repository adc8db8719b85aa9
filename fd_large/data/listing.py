"""The names of a data set's samples in one file that is mapped into memory, and its cache.

A worker holds no list: names and numbers stay in the file, of which the system keeps in memory
what is used, once for all processes. Making the file means walking over the whole data set, so a
large one is kept in a cache folder and used again while what was looked at (`stamps`: modification
times of folders, sizes and times of shards) is as it was.

File: names | padding | columns of int64 | JSON footer | its length (8 bytes) | mark.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import mmap
import os
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fd_large.errors import DataError

log = logging.getLogger(__name__)

# Fewer samples are listed faster than anyone notices, and need no file.
CACHED_FROM = 20_000
# A folder changed less than this before it was listed may have changed again within the same tick
# of its clock: not to be trusted next time.
SETTLED_SECONDS = 2.0
_MARK = b"fd-list1"
_STALE_SECONDS = 24 * 3600


class Listing:
    """Names by number, and columns of int64 of the same length; read only.

    `fingerprint` is a hash of all names in order; `facts` what the maker noted, in JSON's types.
    """

    def __init__(self, buffer: bytes | mmap.mmap, path: str | None) -> None:
        """Reads the footer; ValueError or KeyError if the file is not whole."""
        self._buffer, self._path = buffer, path
        size = len(buffer)
        if buffer[size - len(_MARK) : size] != _MARK:
            raise ValueError("no listing, or not whole")
        length = int.from_bytes(buffer[size - len(_MARK) - 8 : size - len(_MARK)], "little")
        footer = json.loads(buffer[size - len(_MARK) - 8 - length : size - len(_MARK) - 8])
        self.fingerprint: str = footer["fingerprint"]
        self.facts: dict[str, Any] = footer["facts"]
        num, self._columns = footer["num"], {}
        for name, start in footer["columns"].items():
            self._columns[name] = np.frombuffer(buffer, np.int64, num, start)
        self._ends = self._columns["ends"]

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> bytes:
        """The name of sample `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        start = int(self._ends[index - 1]) if index else 0
        return self._buffer[start : int(self._ends[index])]

    def number(self, column: str, index: int) -> int:
        """The number of sample `index` in a column."""
        return int(self._columns[column][index])

    def __getstate__(self) -> dict[str, Any]:
        if self._path is None:
            return {"buffer": bytes(self._buffer)}
        return {"path": self._path, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "buffer" in state:
            self.__init__(state["buffer"], None)
            return
        with open(state["path"], "rb") as file:
            self.__init__(_map(file), state["path"])
        if self.fingerprint != state["fingerprint"]:
            raise DataError(
                f"{state['path']}: the list of images changed while a run used it; got other "
                "names, expected the run's. Start the run again once the data no longer change."
            )


class ListingWriter:
    """Takes samples one by one; names go to the file at once."""

    def __init__(self, file: BinaryIO, columns: tuple[str, ...]) -> None:
        self._file = file
        self._columns = {name: array("q") for name in ("ends", *columns)}
        self._end = 0
        self._hash = hashlib.sha256()

    def __len__(self) -> int:
        return len(self._columns["ends"])

    def add(self, name: bytes, *numbers: int) -> None:
        """Adds a sample with its numbers, in the order of the columns."""
        self._file.write(name)
        self._hash.update(name + b"\0")
        self._end += len(name)
        for column, number in zip(self._columns.values(), (self._end, *numbers), strict=True):
            column.append(number)

    def finish(self, facts: dict[str, Any]) -> None:
        """Writes columns, facts and the mark that makes the file whole."""
        self._file.write(bytes(-self._end % 8))
        start = self._end + -self._end % 8
        starts = {}
        for name, column in self._columns.items():
            starts[name] = start
            self._file.write(column.tobytes())
            start += 8 * len(column)
        footer = {
            "num": len(self),
            "fingerprint": self._hash.hexdigest(),
            "columns": starts,
            "facts": facts,
        }
        text = json.dumps(footer).encode()
        self._file.write(text + len(text).to_bytes(8, "little") + _MARK)
        self._file.flush()


def cache_folder() -> Path:
    """FD_CACHE, else fd_large in XDG_CACHE_HOME or in ~/.cache."""
    if folder := os.environ.get("FD_CACHE"):
        return Path(folder)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "fd_large"


def listed(
    key: str,
    *,
    columns: tuple[str, ...] = (),
    fill: Callable[[ListingWriter], dict[str, Any]],
    is_current: Callable[[dict[str, Any]], bool],
) -> Listing:
    """The listing of that key: from the cache where it is current, else made anew.

    Any number of processes may ask at once: one makes it, the others wait and take it; where the
    file system has no locks each makes its own and the last one stays. A cache folder that cannot
    be written costs the walk at every start and nothing else.

    Args:
        key: What is listed.
        columns: Names of the numbers that each sample carries.
        fill: Adds all samples to the writer; returns facts, among them `stamps`.
        is_current: Says, given these facts, whether the data set is still as it was.
    """
    folder = cache_folder() / "listings"
    path = folder / f"{hashlib.sha256(f'{_MARK!r} {key}'.encode()).hexdigest()[:32]}.listing"
    listing = _load(path, is_current)
    if listing is None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _only_one(folder):
                listing = _load(path, is_current) or _make_in(folder, path, columns, fill)
        except OSError as error:
            log.info("the list of images is not kept: cannot write to %s (%s)", folder, error)
            with tempfile.TemporaryFile() as file:
                _fill(file, columns, fill)
                listing = Listing(_map(file), None)
    listing.facts.pop("stamps", None)  # as long as the data set may be; no worker needs it
    return listing


def _make_in(
    folder: Path,
    path: Path,
    columns: tuple[str, ...],
    fill: Callable[[ListingWriter], dict[str, Any]],
) -> Listing:
    descriptor, partial = tempfile.mkstemp(prefix=".partial-", dir=folder)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            if _fill(file, columns, fill) < CACHED_FROM:
                return Listing(_map(file), None)
            os.fsync(file.fileno())
            os.replace(partial, path)
            _remove_stale(folder)
            return Listing(_map(file), str(path))
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def settled(modified_ns: int, listed_at: float) -> bool:
    """Whether a time of modification lies far enough before the listing to be told from later."""
    return modified_ns / 1e9 < listed_at - SETTLED_SECONDS


def _fill(
    file: BinaryIO, columns: tuple[str, ...], fill: Callable[[ListingWriter], dict[str, Any]]
) -> int:
    writer = ListingWriter(file, columns)
    start = time.time()
    facts = fill(writer)
    writer.finish({**facts, "listed_at": start})
    took = time.time() - start
    if took > 1:
        log.info("listed %d images in %.0f s", len(writer), took)
    return len(writer)


def _map(file: BinaryIO) -> mmap.mmap:
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _load(path: Path, is_current: Callable[[dict[str, Any]], bool]) -> Listing | None:
    try:
        with open(path, "rb") as file:
            found = Listing(_map(file), str(path))
        return found if is_current(found.facts) else None
    except (OSError, ValueError, KeyError, TypeError):  # absent, damaged, another version's
        return None


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system frees when its holder dies."""
    with open(folder / "lock", "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems have no locks
            log.info("listing images without a lock on %s: %s", folder, error)
        yield


def _remove_stale(folder: Path) -> None:
    """Removes what processes that were killed left behind."""
    for path in folder.glob(".partial-*"):
        try:
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                path.unlink()
        except OSError:
            pass  # another process was faster

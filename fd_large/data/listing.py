"""The names of a dataset's samples, and numbers of each, in one file that is mapped into memory.

A worker holds no list: names and numbers stay in the file, of which the system keeps in memory
what is used, once for all processes. Making the file means walking over the whole dataset, so a
large one is kept in a cache folder and used again while what was looked at (modification times of
folders, sizes and times of shards) is as it was.

The file is one of safetensors: `names` (bytes, one after the other), `ends` (int64, where each name
ends), a column of int64 for each further number, and what the maker noted as JSON.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fd_large.errors import DataError

log = logging.getLogger(__name__)

# Fewer samples are listed faster than anyone notices, and need no file.
CACHED_FROM = 20_000
# A folder changed less than this before it was listed may have changed again within the same tick
# of its clock: not to be trusted next time.
SETTLED_SECONDS = 2.0
# In the name of each file: another layout is another file.
_LAYOUT = "fd-list2"
_STALE_SECONDS = 24 * 3600

Add = Callable[..., None]
"""Takes the name of a sample, bytes, and its numbers in the order of the columns."""
Fill = Callable[[Add], dict[str, Any]]
"""Adds all samples; returns facts in JSON's types, of which `stamps` are not kept in memory."""


class Listing:
    """Names by number, and columns of int64 of the same length; read only.

    Attributes:
        arrays: `names`, `ends` and the columns.
        facts: What the maker noted.
        fingerprint: A hash of all names in order.
    """

    def __init__(
        self, arrays: dict[str, NDArray], facts: dict[str, Any], path: Path | None
    ) -> None:
        self.arrays, self.facts, self._path = arrays, facts, path
        self.fingerprint: str = facts["fingerprint"]

    def __len__(self) -> int:
        return len(self.arrays["ends"])

    def name(self, index: int) -> bytes:
        """The name of sample `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        ends = self.arrays["ends"]
        start = int(ends[index - 1]) if index else 0
        return self.arrays["names"][start : int(ends[index])].tobytes()

    def number(self, column: str, index: int) -> int:
        """The number of sample `index` in a column."""
        return int(self.arrays[column][index])

    def __reduce__(self) -> tuple[Any, ...]:
        if self._path is None:
            return Listing, (self.arrays, self.facts, None)
        return _reopen, (self._path, self.fingerprint)  # The file, not the names.


def listed(
    key: str,
    *,
    columns: tuple[str, ...] = (),
    fill: Fill,
    is_current: Callable[[dict[str, Any]], bool],
) -> Listing:
    """The listing of that key: from the cache where it is current, else made anew.

    Any number of processes may ask at once: one makes it, the others wait and take it; where the
    file system has no locks each makes its own and the last one stays. A cache folder that cannot
    be written costs the walk at every start and nothing else.

    Args:
        key: What is listed.
        columns: Names of the numbers that each sample carries.
        fill: Adds all samples and returns the facts.
        is_current: Says, given these facts, whether the dataset is still as it was.
    """
    folder = cache_folder() / "listings"
    path = folder / f"{hashlib.sha256(f'{_LAYOUT} {key}'.encode()).hexdigest()[:32]}.listing"
    listing = _load(path, is_current)
    if listing is None:
        with _only_one(folder):
            listing = _load(path, is_current) or _keep(_make(columns, fill), path)
    listing.facts.pop("stamps", None)  # As long as the dataset may be; no worker needs them.
    return listing


def cache_folder() -> Path:
    """FD_CACHE, else fd_large in XDG_CACHE_HOME or in ~/.cache."""
    if folder := os.environ.get("FD_CACHE"):
        return Path(folder)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "fd_large"


def settled(modified_ns: int, listed_at: float) -> bool:
    """Whether a modification is old enough that a later one would have another time.

    Args:
        modified_ns: Modification time, in ns since the epoch.
        listed_at: When it was looked at, in seconds since the epoch.
    """
    return modified_ns / 1e9 < listed_at - SETTLED_SECONDS


def _make(columns: tuple[str, ...], fill: Fill) -> Listing:
    names, numbers = bytearray(), {name: array("q") for name in ("ends", *columns)}
    digest, start = hashlib.sha256(), time.time()

    def add(name: bytes, *values: int) -> None:
        names.extend(name)
        digest.update(name + b"\0")
        for column, value in zip(numbers.values(), (len(names), *values), strict=True):
            column.append(value)

    facts = {**fill(add), "listed_at": start, "fingerprint": digest.hexdigest()}
    if (took := time.time() - start) > 1:
        log.info("listed %d images in %.0f s", len(numbers["ends"]), took)
    arrays = {name: np.array(column, np.int64) for name, column in numbers.items()}
    return Listing({"names": np.frombuffer(names, np.uint8), **arrays}, facts, None)


def _keep(listing: Listing, path: Path) -> Listing:
    """Writes a large listing to a file, where that is possible, and maps the file."""
    if len(listing) < CACHED_FROM:
        return listing
    try:
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=path.parent) as aside:
            partial = Path(aside, path.name)
            save_file(listing.arrays, partial, {"facts": json.dumps(listing.facts)})
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        _remove_stale(path.parent)
        return _open(path)
    except (OSError, SafetensorError) as error:
        log.info("the list of images is not kept: cannot write to %s (%s)", path.parent, error)
        return listing


def _open(path: Path) -> Listing:
    with safe_open(path, "pt") as file:  # Tensors of torch are mapped, NumPy's would be read.
        arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        return Listing(arrays, json.loads(file.metadata()["facts"]), path)


def _load(path: Path, is_current: Callable[[dict[str, Any]], bool]) -> Listing | None:
    try:
        found = _open(path)
        return found if is_current(found.facts) else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):  # Absent or damaged.
        return None


def _reopen(path: Path, fingerprint: str) -> Listing:
    found = _open(path)
    if found.fingerprint != fingerprint:
        raise DataError(
            f"{path}: the list of images changed while a run used it; got other names, expected "
            "the run's. Start the run again once the data no longer change."
        )
    found.facts.pop("stamps", None)
    return found


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """Holds the folder's lock, which the system frees when its holder dies."""
    with ExitStack() as stack:
        with suppress(OSError):  # Not to be written to, or a file system without locks.
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / "lock", "ab"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _remove_stale(folder: Path) -> None:
    """Removes what processes that were killed left behind."""
    for path in folder.glob(".partial-*"):
        with suppress(OSError):  # Another process was faster.
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path)

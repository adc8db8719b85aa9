"""Listing of a dataset: the names of its samples, with numeric columns, in a memory-mapped file.

Loading processes hold no list of samples. Names and numbers stay in the file, whose used pages are
in memory once for all processes. Making the file requires a walk over the whole dataset, so that
one rank makes it for all ranks (`meeting.py`). The file of a large dataset is kept in a cache
folder, and reused as long as the dataset's stamps (modification times of folders, sizes and
modification times of shards) are unchanged.

The file is in the safetensors format. The file has the arrays `names` (the concatenated bytes of
all names) and `ends` (int64, the end of each name), an array for each column of numbers, and a dict
of facts about the dataset as JSON.
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fd_large.data.roots import local_kind
from fd_large.errors import DataError
from fd_large.files import PARTIAL, STALE_SECONDS, parse_json
from fd_large.ranks import activity

log = logging.getLogger(__name__)

# Number of samples from which on a listing is cached; a smaller one is made in no time.
CACHED_FROM = 20_000
# A folder that changed less than this before it was listed may change again with the same time
# stamp, so its listing is not reused.
SETTLED_SECONDS = 2.0
# Part of each file's name, so that files of another layout are not read.
_LAYOUT = "fd-list3"

Made = tuple[Mapping[str, NDArray], dict[str, Any]]
"""A listing's arrays (`names`, `ends` and others), and facts about the dataset in JSON's types.
Every dict of facts has `fingerprint`, a hash of the samples. The fact `stamps` is not kept in
memory."""
Add = Callable[..., None]
"""Function that adds a sample, given its name as bytes, and one number for each column in order."""
Fill = Callable[[Add], dict[str, Any]]
"""Function that adds all samples of a dataset by calling its argument, and returns the facts about
the dataset except for the fingerprint."""


class Listing:
    """Read-only names and numbers of a dataset's samples, by index.

    Attributes:
        arrays: `names`, the concatenated bytes of all names; `ends`, (num_samples,) int64, the end
            of each name in `names`; an array (num_samples,) for each column of numbers.
        facts: Facts about the dataset, recorded when the listing was made.
        path: The file that holds the arrays; None if they are in memory.
        fingerprint: A hash of the samples.
    """

    def __init__(
        self, arrays: Mapping[str, NDArray], facts: dict[str, Any], path: Path | None
    ) -> None:
        self.arrays, self.facts, self.path = arrays, facts, path
        self.fingerprint: str = facts["fingerprint"]

    def __len__(self) -> int:
        return len(self.arrays["ends"])

    def name(self, index: int) -> bytes:
        """Returns the name of sample `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        ends = self.arrays["ends"]
        start = int(ends[index - 1]) if index else 0
        return self.arrays["names"][start : int(ends[index])].tobytes()

    def number(self, column: str, index: int) -> int:
        """Returns the integer that a column holds for sample `index`."""
        return int(self.arrays[column][index])

    def __reduce__(self) -> tuple[Any, ...]:
        if self.path is None:
            return Listing, (self.arrays, self.facts, None)
        return _reopen, (self.path, self.fingerprint)  # Another process maps the file again.


def listed(
    dataset: str,
    anchor: str,
    *,
    make: Callable[[], Made],
    is_current: Callable[[dict[str, Any]], bool],
) -> Listing:
    """Returns the listing of a dataset, from the cache if the dataset is unchanged, else a new one.

    If all ranks call this function within `ranks.meeting.meet`, rank 0 makes the listing for all
    ranks that see the same dataset. If the dataset is on a disk of each node, the first rank of a
    node makes the listing for its node. The other ranks map the listing's file, or receive the
    contents of the file if they cannot map it. Outside `meet` each rank makes its own listing.

    Of several concurrent runs, one run makes the listing and the other runs wait for the file.
    Without file locks each run makes its own listing, and the last file stays. If the cache folder
    cannot be written, every launch makes the listing again.

    Args:
        dataset: Description of the dataset's kind; with `anchor` it identifies the listing.
        anchor: The file or folder that identifies the dataset, the same on all ranks.
        make: Function that lists the dataset.
        is_current: Function that takes the facts of a cached listing, and returns whether the
            dataset is unchanged since then.
    """
    # This imports torch, which takes seconds, and which scoring files of results does not need.
    from fd_large.ranks import meeting

    name = f"{dataset} {anchor}"
    listings: list[Listing] = []

    def here() -> Listing:
        if not local_kind(anchor):
            return _timed(make)  # Raises the error about a missing dataset.
        path = _path(dataset, anchor)
        listing = _load(path, is_current)
        if listing is None:
            with locked(path.with_suffix(".lock")):
                listing = _load(path, is_current) or _keep(_timed(make), path)
        return listing

    def hold(listing: Listing) -> _Note:
        meeting.offer(name, (listing.arrays, dict(listing.facts)))
        listings.append(listing)
        return _Note(listing.path, listing.fingerprint, _identity(anchor))

    def sent() -> Listing:
        arrays, facts = meeting.fetch(name)
        return Listing(arrays, facts, None)

    def hold_for_node(first: _Note) -> _Note:
        if first.identity != _identity(anchor):
            return hold(here())
        return hold(_opened(first) or _keep(sent(), _path(dataset, anchor)))

    first = meeting.once(name, lambda: hold(here()))
    note = meeting.once(name, lambda: first if listings else hold_for_node(first), of_node=True)
    if not listings:
        listing = _opened(note)
        if listing is None:
            listing = sent() if note.fingerprint == first.fingerprint else here()
        listings.append(listing)
    # The stamps may be as many as the samples, and no worker needs them.
    listings[0].facts.pop("stamps", None)
    return listings[0]


def filled(columns: tuple[str, ...], fill: Fill) -> Made:
    """Collects the names and numbers of all samples of a dataset, for a new listing.

    Args:
        columns: Names of the columns of numbers (int64).
        fill: Function that adds all samples, and returns the facts about the dataset.

    Returns: the arrays of the listing, and the facts with the fingerprint added.
    """
    names, numbers = bytearray(), {name: array("q") for name in ("ends", *columns)}
    digest = hashlib.sha256()

    def add(name: bytes, *values: int) -> None:
        names.extend(name)
        digest.update(name + b"\0")
        for column, value in zip(numbers.values(), (len(names), *values), strict=True):
            column.append(value)
        count = len(numbers["ends"])
        if count % 1000 == 0:
            work.reach(count)

    with activity.work("listing", unit="images") as work:
        facts = {**fill(add), "fingerprint": digest.hexdigest()}
    arrays = {name: np.array(column, np.int64) for name, column in numbers.items()}
    return {"names": np.frombuffer(names, np.uint8), **arrays}, facts


def cache_folder() -> Path:
    """Returns the user's cache folder, which need not exist.

    The folder is $FD_CACHE if it is set, else $XDG_CACHE_HOME/fd_large if that is set, else
    ~/.cache/fd_large.
    """
    if folder := os.environ.get("FD_CACHE"):
        return Path(folder)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(home) / "fd_large"


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds an exclusive file lock within the block; the system releases it if the process dies.

    In a read-only folder, or on a file system without locks, the block runs without a lock. The
    file `path` of the lock is made if missing.

    Yields: False if `wait` is False and another process holds the lock, else True.
    """
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(path, "ab"))
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            log.debug("no lock on %s: %s", path, error)
        yield True


def settled(modified_ns: int, listed_at: float) -> bool:
    """Whether any change after a listing is certain to get another time stamp than the last change.

    A file or folder that changed shortly before the listing may change again within the resolution
    of the time stamps. The result is False if the last change was `SETTLED_SECONDS` or less before
    the listing.

    Args:
        modified_ns: Modification time of the file or folder, in ns since the epoch.
        listed_at: Time of the listing, in seconds since the epoch.
    """
    return modified_ns / 1e9 < listed_at - SETTLED_SECONDS


class _Note(NamedTuple):
    """A rank's message to other ranks about the listing that the rank has.

    Attributes:
        path: File of the listing, or None if the listing has no file.
        fingerprint: Fingerprint of the listing.
        identity: `_identity` of the dataset's anchor on the sending rank.
    """

    path: Path | None
    fingerprint: str
    identity: tuple[int, ...]


def _identity(anchor: str) -> tuple[int, ...]:
    """Returns inode number, modification time and change time in ns of the file or folder `anchor`.

    The numbers are equal on all clients of a file system, and differ for a copy of the file on
    another file system. The result is empty if they cannot be read.
    """
    try:
        status = os.stat(anchor)
    except OSError:
        return ()
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _path(dataset: str, anchor: str) -> Path:
    # The inode tells disks of the same path apart, and is the same for all clients of a file
    # system, which the number of the device is not.
    key = f"{_LAYOUT} {dataset} {os.path.realpath(anchor)} {os.stat(anchor).st_ino}"
    folder = cache_folder() / "listings"
    return folder / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:32]}.listing"


def _timed(make: Callable[[], Made]) -> Listing:
    start = time.time()
    arrays, facts = make()
    listing = Listing(arrays, {**facts, "listed_at": start}, None)
    if (took := time.time() - start) > 1:
        log.info("listed %s images in %.0f s", f"{len(listing):,}", took)
    return listing


def _keep(listing: Listing, path: Path) -> Listing:
    """Writes a listing to the file `path`, and returns a listing that maps this file into memory.

    If the listing has fewer than `CACHED_FROM` samples, no file is written. In this case, and if
    the file cannot be written, `listing` itself is returned.
    """
    if max(len(a) for name, a in listing.arrays.items() if name != "names") < CACHED_FROM:
        return listing
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=path.parent) as aside:
            partial = Path(aside, path.name)
            save_file(dict(listing.arrays), partial, {"facts": json.dumps(listing.facts)})
            with open(partial, "rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        _remove_stale(path.parent)
        return _open(path)
    except (OSError, SafetensorError) as error:
        log.info(
            "the list of images is not kept, and every start makes it again: cannot write to %s "
            "(%s)",
            path.parent,
            error,
        )
        return listing


def _open(path: Path) -> Listing:
    with safe_open(path, "pt") as file:  # Tensors of torch are mapped, NumPy's would be read.
        arrays = {name: file.get_tensor(name).numpy() for name in file.keys()}  # noqa: SIM118
        return Listing(arrays, parse_json(file.metadata()["facts"]), path)


def _load(path: Path, is_current: Callable[[dict[str, Any]], bool]) -> Listing | None:
    try:
        listing = _open(path)
        return listing if is_current(listing.facts) else None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):  # It is absent or damaged.
        return None


def _opened(note: _Note) -> Listing | None:
    """Maps the file of the listing that another rank has made, as the rank's message tells.

    The result is None if the listing has no file, or if this rank cannot read the file or finds
    another listing in it.
    """
    if note.path is None:
        return None
    with suppress(SafetensorError, OSError, ValueError, KeyError, TypeError):
        listing = _open(note.path)
        if listing.fingerprint == note.fingerprint:
            return listing
    return None


def _reopen(path: Path, fingerprint: str) -> Listing:
    listing = _open(path)
    if listing.fingerprint != fingerprint:
        raise DataError(
            f"{path}: the list of images changed while a run used it; got other names, expected "
            "the run's. Start the run again when the data no longer change."
        )
    listing.facts.pop("stamps", None)
    return listing


def _remove_stale(folder: Path) -> None:
    """Removes partial files of killed processes, older than `STALE_SECONDS`, from a folder."""
    for path in folder.glob(f"{PARTIAL}*"):
        with suppress(OSError):  # Another process was faster.
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(path)

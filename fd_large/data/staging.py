"""`data.stage_to`: a verified copy of the images on a disk of each node.

Any sample of an epoch may fall to any rank, so a node takes the whole dataset. Tar shards are
copied one to one; a folder is packed into tar files of its images, in the order of their names,
which are the same dataset (`shards.py`). Names, order and pixels stay as they are.

A copy is FILE.staged with a note beside it, FILE.staged.json: its origin, its checksum, and a
stamp by which a later start sees that nothing has touched it. The ending keeps copies out of every
listing of images.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fd_large.data.blocks import BlockImages
from fd_large.data.folder import ImageFolder
from fd_large.data.photographs import Photographs
from fd_large.data.shards import TarShards
from fd_large.data.source import ImageSource
from fd_large.errors import DataError
from fd_large.files import PARTIAL, PASSING, json_object
from fd_large.ranks import distributed, meeting

log = logging.getLogger(__name__)

# Files copied at a time by the one rank of a node that copies: one stream does not fill a network.
STREAMS = 8
# So many images of a folder go into one tar file, about 1.1 GB of ImageNet's.
IMAGES_PER_FILE = 10_000
# What a full disk takes from others (notes, a run's own files) is not ours to use up.
SPARE_BYTES = 64 << 20
_CHUNK = 8 << 20
_REPORT_SECONDS = 10.0


def stage(source: ImageSource, folder: str) -> ImageSource:
    """Copies a dataset to a folder of this node's own, and reads from there; on all ranks alike.

    The first rank of each node copies what is not there yet; the others wait with it.

    Args:
        source: The dataset; what comes along with the package stays where it is.
        folder: A folder on a local disk, the same path on all nodes; "" copies nothing.

    Returns: the same samples in the same order, with the same fingerprint.
    Raises: DataError: if a node cannot make its copy, or nodes have read different bytes, or the
        source is labelled or the user's own.
    """
    if folder and isinstance(source, BlockImages):
        raise DataError(
            f"data.stage_to: {source.kind} are kept in blocks on each node as they are needed; got "
            f"{folder!r}, expected nothing. Set --data.cache {folder} and --data.cache_gb instead."
        )
    if folder and not isinstance(source, (TarShards, ImageFolder, Photographs)):
        raise DataError(
            "data.stage_to: only folders and tar files of images without labels are copied; got "
            f"{folder!r} for {type(source).__name__}, expected nothing. Copy the dataset to every "
            "node, and set --data.root."
        )
    files = _files(source) if folder else []
    if not files:
        if folder:
            log.info("data.stage_to: nothing to copy: the images come from installed packages")
        return source
    copy = _Copy(Path(folder), files)
    with ThreadPoolExecutor(1, "staging") as thread:  # Its rank goes on answering the others.
        work = thread.submit(copy.run) if distributed.local_rank() == 0 else None
        try:
            _wait(copy, work)
        finally:
            copy.stop.set()
    paths = [os.path.join(folder, file.name) for file in files]
    if isinstance(source, TarShards):
        return source.at(paths)
    found = meeting.meet(lambda: TarShards(paths))
    assert found.fingerprint == source.fingerprint, "the copy has other names than the folder"
    return found


class _State(NamedTuple):
    """How far a node is, as all ranks hear it."""

    node: str
    finished: bool
    error: str
    done_bytes: int
    total_bytes: int
    checksum: str


def _wait(copy: _Copy, work: Future[str] | None) -> None:
    """Meets the other ranks again and again, since a single wait of hours would time out."""
    pause, reported = 0.02, time.monotonic()
    while True:
        finished = work is None or work.done()
        failure = work.exception() if work is not None and finished else None
        checksum = work.result() if work is not None and finished and failure is None else ""
        error = str(failure) or repr(failure) if failure is not None else ""
        states = distributed.gather_objects(
            _State(distributed.node_name(), finished, error, copy.done, copy.total, checksum)
        )
        if failure is not None and not isinstance(failure, DataError):
            raise failure
        for state in states:
            if state.error:
                raise DataError(state.error if len(states) == 1 else f"{state.node}: {state.error}")
        if all(state.finished for state in states):
            break
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            copiers = [state for state in states if not state.finished]
            slowest = min(copiers, key=lambda state: state.done_bytes / max(1, state.total_bytes))
            log.info(
                "data.stage_to: %.1f of %.1f GB on %s, the slowest of %d still at it",
                slowest.done_bytes / 1e9,
                slowest.total_bytes / 1e9,
                slowest.node,
                len(copiers),
            )
        time.sleep(pause)
        pause = min(1.0, 2 * pause)
    copied = [state for state in states if state.checksum]
    if others := sorted({s.node for s in copied if s.checksum != copied[0].checksum}):
        raise DataError(
            f"data.stage_to: the copies differ; got other bytes on {', '.join(others)}, expected "
            f"those of {copied[0].node}. Remove {copy.folder} there and start again."
        )


class _File(NamedTuple):
    """One file to be.

    Attributes:
        name: Its name in the folder of the copies.
        origin: What it is a copy of, in JSON's types: another origin is another copy.
        modified: Modification time of the copy, in ns: the same on every node.
        size: Measures the bytes that the copy will take.
        chunks: Reads its bytes.
    """

    name: str
    origin: dict[str, Any]
    modified: int
    size: Callable[[], int]
    chunks: Callable[[], Iterator[bytes]]


class _Stopped(Exception):
    """Another rank has failed, or another file of this one."""


class _Copy:
    """The copying of one node.

    Attributes:
        stop: Set to end it early.
        done: Bytes that are copied.
        total: Bytes that were missing.
    """

    def __init__(self, folder: Path, files: list[_File]) -> None:
        self.folder, self.files = folder, files
        self.stop, self._guard = threading.Event(), threading.Lock()
        self.done = self.total = 0

    def run(self) -> str:
        """Copies what is missing; returns the checksum of all."""
        try:
            return self._run()
        except OSError as error:
            raise DataError(
                f"data.stage_to: cannot be written; got {error.strerror or error} for "
                f"{error.filename or self.folder}, expected a folder on a local disk with room. "
                "Mend that, choose another folder, or leave --data.stage_to out."
            ) from error

    def _run(self) -> str:
        started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone(), ThreadPoolExecutor(STREAMS) as pool:
            try:
                checksums = list(pool.map(self._checksum_if_sound, self.files))
                missing = [f for f, found in zip(self.files, checksums, strict=True) if not found]
                self.total = sum(pool.map(lambda file: file.size(), missing))
                self._check_room(len(missing))
                made = iter(list(pool.map(self._make, missing)))
            except BaseException:
                self.stop.set()
                raise
        if missing:
            log.info(
                "data.stage_to: %s: %d of %d files copied, %.2f GB in %.0f s",
                self.folder,
                len(missing),
                len(self.files),
                self.done / 1e9,
                time.monotonic() - started,
            )
        else:
            log.info("data.stage_to: %s: all %d files are there", self.folder, len(self.files))
        return hashlib.sha256("".join(c or next(made) for c in checksums).encode()).hexdigest()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the folder's lock, which the system frees when its holder dies."""
        with open(self.folder / ".lock", "ab") as lock:
            try:
                if not _locked(lock):
                    log.info("data.stage_to: another run copies to %s: waiting", self.folder)
                    while not _locked(lock):
                        if self.stop.wait(0.2):
                            raise _Stopped
                for path in self.folder.glob(f"{PARTIAL}*"):
                    path.unlink()  # A copy that was killed left it.
            except OSError as error:
                # Then two may copy the same: each writes aside, and what stays is whole.
                log.info("data.stage_to: no lock on %s: %s", self.folder, error)
            yield

    def _check_room(self, num_missing: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if num_missing and self.total + SPARE_BYTES > free:
            raise DataError(
                f"data.stage_to: too little room in {self.folder}; got {free / 1e9:.2f} GB free, "
                f"expected {(self.total + SPARE_BYTES) / 1e9:.2f} GB: every node takes the whole "
                "dataset. Make room, choose another folder, or leave --data.stage_to out."
            )

    def _checksum_if_sound(self, file: _File) -> str:
        """The checksum of the copy that is there; "" if there is none, or it has to be removed."""
        if self.stop.is_set():
            raise _Stopped
        path = self.folder / file.name
        try:
            note = json_object(_note(path))
            if note["origin"] == file.origin:
                if note["stamp"] == _stamp(path):
                    return str(note["sha256"])
                if note["sha256"] == _checksum(path):
                    _write_note(path, file.origin, note["sha256"])
                    return str(note["sha256"])
                log.warning("data.stage_to: %s: DAMAGED, copied again", path)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # Absent, or of a start that did not end.
        path.unlink(missing_ok=True)
        return ""

    def _make(self, file: _File) -> str:
        """Writes a copy aside, reads it back, and only then gives it its name."""
        descriptor, aside = tempfile.mkstemp(prefix=PARTIAL, dir=self.folder)
        try:
            digest = hashlib.sha256()
            with os.fdopen(descriptor, "wb") as copy:
                for chunk in file.chunks():
                    if self.stop.is_set():
                        raise _Stopped
                    copy.write(chunk)
                    digest.update(chunk)
                    with self._guard:
                        self.done += len(chunk)
                copy.flush()
                os.fsync(copy.fileno())
                # What is read back is then the disk's, not the system's memory of it.
                os.posix_fadvise(copy.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            checksum = digest.hexdigest()
            if _checksum(Path(aside)) != checksum:
                raise DataError(
                    f"data.stage_to: {self.folder} does not give back what was written; got "
                    f"another checksum of {file.name}, expected the one of {file.origin['path']}. "
                    "Have the disk looked at, or choose another folder."
                )
            os.chmod(aside, 0o644)
            os.utime(aside, ns=(file.modified, file.modified))
            os.replace(aside, self.folder / file.name)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(aside)
        _write_note(self.folder / file.name, file.origin, checksum)
        return checksum


def _locked(lock: BinaryIO) -> bool:
    """Takes the lock; False if another process holds it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _checksum(path: Path) -> str:
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_note(path: Path, origin: dict[str, Any], checksum: str) -> None:
    note = {"origin": origin, "sha256": checksum, "stamp": _stamp(path)}
    aside = path.with_name(f"{PARTIAL}{path.name}.json")
    aside.write_text(json.dumps(note))
    aside.replace(_note(path))


def _stamp(path: Path) -> list[Any]:
    """What no change of a file leaves as it was; another boot may have lost what was written."""
    status, boot = path.stat(), ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, boot]


def _files(source: ImageSource) -> list[_File]:
    """The files that a copy is made of; none for what stays where it is."""
    if isinstance(source, TarShards):
        stamps = zip(source.paths, source.sizes_and_times, strict=True)
        return [_shard(os.path.realpath(path), *stamp) for path, stamp in stamps]
    if isinstance(source, ImageFolder):
        places = range(len(source))
        starts = places[::IMAGES_PER_FILE]
        return [_packed(source, places[start : start + IMAGES_PER_FILE]) for start in starts]
    return []


def _name(path: str, name: str) -> str:
    """The name of a copy; shards of one name in two folders are two copies."""
    folder = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    return f"{folder}-{name[-100:]}.staged"


def _shard(path: str, size: int, modified: int) -> _File:
    """The copy of a tar shard."""

    def chunks() -> Iterator[bytes]:
        done = 0
        try:
            with open(path, "rb", buffering=0) as file:
                while chunk := file.read(_CHUNK):
                    done += len(chunk)
                    yield chunk
                now = os.fstat(file.fileno())
        except OSError as error:
            raise _unreadable(path, error.strerror or str(error)) from error
        if (done, now.st_size, now.st_mtime_ns) != (size, size, modified):
            raise _unreadable(path, "a shard that changed since it was indexed")

    origin = {"path": path, "size": size, "modified": modified}
    return _File(_name(path, os.path.basename(path)), origin, modified, lambda: size, chunks)


def _packed(folder: ImageFolder, indices: range) -> _File:
    """A tar file of some of a folder's images; the same bytes on every node."""
    root = os.path.realpath(folder.root)

    def size() -> int:
        # A name of more than 100 bytes takes two blocks more; rounding takes at most one.
        total = (2 + 4 * len(indices)) * tarfile.BLOCKSIZE
        for index in indices:
            with suppress(OSError):
                total += os.stat(folder[index]).st_size
        return total

    def chunks() -> Iterator[bytes]:
        for index in indices:
            try:
                encoded = bytes(folder.read(index))
            except DataError as error:
                cause = error.__cause__
                # A file system that fails for now says nothing of the image.
                if isinstance(cause, OSError) and cause.errno in PASSING:
                    raise _unreadable(folder[index], cause.strerror or str(cause)) from error
                # As bad in the copy as where it came from: an empty file is no image either.
                log.warning("data.stage_to: %s", error)
                encoded = b""
            info = tarfile.TarInfo(os.path.relpath(folder[index], folder.root))
            info.size = len(encoded)
            yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
            yield encoded
            yield bytes(-len(encoded) % tarfile.BLOCKSIZE)
        yield bytes(2 * tarfile.BLOCKSIZE)

    origin = {
        "path": root,
        "names": folder.fingerprint,
        "modified": folder.modified,
        "first": indices[0],
        "last": indices[-1],
    }
    name = _name(root, f"{os.path.basename(root)}-{indices[0] // IMAGES_PER_FILE:05d}.tar")
    return _File(name, origin, folder.modified, size, chunks)


def _unreadable(path: str, what: str) -> DataError:
    return DataError(
        f"data.stage_to: {path}: cannot be copied; got {what}, expected the file that data.root "
        "lists. Restore it, or start again to list it anew."
    )

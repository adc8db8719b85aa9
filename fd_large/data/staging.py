"""`data.stage_to`: the images on a disk of each node, copied once and checked.

Any sample of an epoch's permutation may fall to any rank, so a node needs all of the data set. Tar
shards are copied one to one; a folder is packed into tar files of its images, in the order of
their names, which are the same data set (`shards.py`). Names, order and pixels stay as they are.

A copy is FILE.staged with a note beside it, FILE.staged.json: its origin, its checksum, and
a stamp by which a later start sees that nothing has touched it. The ending keeps copies out of
every listing of images.
"""

from __future__ import annotations

import errno
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from fd_large import distributed
from fd_large.data.folder import ImageFolder
from fd_large.data.shards import TarShards
from fd_large.data.source import ImageSource
from fd_large.errors import DataError

log = logging.getLogger(__name__)

# Files copied at a time by the one rank of a node that copies: one stream does not fill a network.
STREAMS = 8
# A piece of a packed folder; of ImageNet's images about 1.1 GB.
PICTURES_PER_PIECE = 10_000
# What a full disk takes from others (notes, a run's own files) is not ours to use up.
SPARE_BYTES = 64 << 20
_CHUNK = 8 << 20
_TELL_EVERY_SECONDS = 10.0
_PARTIAL = ".partial-"
_ENDING = ".staged"
# A file system that fails for now says nothing of the image.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOTCONN}


class _Part(NamedTuple):
    """One file to be.

    Attributes:
        name: In the folder of the copies.
        origin: What it is a copy of, in JSON's types: another origin is another copy.
        modified: Time of modification of the copy, in ns: the same on every node.
        size: Measures the bytes that the copy will take.
        chunks: Reads its bytes.
    """

    name: str
    origin: dict[str, Any]
    modified: int
    size: Callable[[], int]
    chunks: Callable[[], Iterator[bytes]]


def stage(source: ImageSource, folder: str) -> ImageSource:
    """Copies a data set to a folder of this node's own, and reads from there; on all ranks alike.

    The first rank of each node copies what is not there yet; the others wait with it.

    Args:
        source: The data set; what comes along with the package stays where it is.
        folder: On a local disk, the same path on all nodes; "": nothing is copied.

    Returns: the same samples in the same order, with the same fingerprint.
    Raises: DataError: if a node cannot make its copy, or nodes have read different bytes.
    """
    parts = _parts(source) if folder else []
    if not parts:
        if folder:
            log.info("data.stage_to: nothing to copy: the images come from installed packages")
        return source
    copying = _Copying(Path(folder), parts)
    if distributed.local_rank() == 0:
        copying.start()
    try:
        _wait(copying, folder)
    finally:
        copying.end()
    paths = [os.path.join(folder, part.name) for part in parts]
    if isinstance(source, TarShards):
        return source.at(paths)
    found = TarShards(paths)
    assert found.fingerprint == source.fingerprint, "the copy has other names than the folder"
    return found


class _State(NamedTuple):
    """How far a node is, as all ranks are told."""

    node: str
    finished: bool
    error: str
    done: int
    total: int
    checksum: str


def _wait(copying: _Copying, folder: str) -> None:
    """Meets the other ranks again and again, since a single wait of hours would time out."""
    pause, told = 0.02, time.monotonic()
    while True:
        states = distributed.gather_objects(copying.state())
        for state in states:
            if state.error:
                if copying.failure is not None and not isinstance(copying.failure, DataError):
                    raise copying.failure
                raise DataError(state.error if len(states) == 1 else f"{state.node}: {state.error}")
        if all(state.finished for state in states):
            break
        if time.monotonic() - told > _TELL_EVERY_SECONDS:
            told = time.monotonic()
            copiers = [state for state in states if not state.finished]
            slowest = min(copiers, key=lambda state: state.done / max(1, state.total))
            log.info(
                "data.stage_to: %.1f of %.1f GB on %s, the slowest of %d still at it",
                slowest.done / 1e9,
                slowest.total / 1e9,
                slowest.node,
                len(copiers),
            )
        time.sleep(pause)
        pause = min(1.0, 2 * pause)
    sums = {state.checksum: state.node for state in states[::-1] if state.checksum}
    if len(sums) > 1:
        nodes = {state.node for state in states if state.checksum not in ("", states[0].checksum)}
        raise DataError(
            f"data.stage_to: the copies differ; got other bytes on {', '.join(sorted(nodes))}, "
            f"expected those of {states[0].node}. Remove {folder} there and start again."
        )


class _Copying:
    """The copying of one node, in a thread: its rank goes on answering the others."""

    def __init__(self, folder: Path, parts: list[_Part]) -> None:
        self.folder, self.parts = folder, parts
        self.failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._stop, self._guard = threading.Event(), threading.Lock()
        self._done = self._total = 0
        self._checksum = ""

    def start(self) -> None:
        """Begins."""
        self._thread = threading.Thread(target=self._run, name="staging", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stops the work where it is not finished, and waits for that."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def state(self) -> _State:
        """How far it is."""
        finished = self._thread is None or not self._thread.is_alive()
        error = "" if self.failure is None else str(self.failure) or repr(self.failure)
        node = distributed.node_name()
        return _State(node, finished, error, self._done, self._total, self._checksum)

    def _run(self) -> None:
        try:
            self._work()
        except OSError as error:
            self.failure = DataError(
                f"data.stage_to: cannot be written; got {error.strerror or error} for "
                f"{error.filename or self.folder}, expected a folder on a local disk with room. "
                "Mend that, choose another folder, or leave --data.stage_to out."
            )
        except BaseException as error:
            self.failure = error

    def _work(self) -> None:
        started = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._alone(), ThreadPoolExecutor(STREAMS) as pool:
            try:
                sums = list(pool.map(self._checksum_if_sound, self.parts))
                missing = [p for p, found in zip(self.parts, sums, strict=True) if found is None]
                self._total = sum(pool.map(lambda part: part.size(), missing))
                self._check_room(len(missing))
                made = iter(list(pool.map(self._copy, missing)))
            except BaseException:
                self._stop.set()
                raise
        known = [found if found is not None else next(made) for found in sums]
        self._checksum = hashlib.sha256("".join(known).encode()).hexdigest()
        took = time.monotonic() - started
        if missing:
            log.info(
                "data.stage_to: %s: %d of %d files copied, %.2f GB in %.0f s",
                self.folder,
                len(missing),
                len(self.parts),
                self._done / 1e9,
                took,
            )
        else:
            log.info("data.stage_to: %s: all %d files are there", self.folder, len(self.parts))

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the folder's lock, which the system frees when its holder dies."""
        with open(self.folder / ".lock", "ab") as file:
            told = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not told:
                        log.info("data.stage_to: another run copies to %s: waiting", self.folder)
                    told = True
                    if self._stop.wait(0.2):
                        raise _Stopped from None
                    continue
                except OSError as error:
                    # Then two may copy the same: each writes aside, and what stays is whole.
                    log.info("data.stage_to: no lock on %s: %s", self.folder, error)
                else:
                    for path in self.folder.glob(f"{_PARTIAL}*"):
                        path.unlink()  # of one that was killed
                yield
                return

    def _check_room(self, num_missing: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if num_missing and self._total + SPARE_BYTES > free:
            raise DataError(
                f"data.stage_to: too little room in {self.folder}; got {free / 1e9:.2f} GB free, "
                f"expected {(self._total + SPARE_BYTES) / 1e9:.2f} GB: every node takes the whole "
                "data set. Make room, choose another folder, or leave --data.stage_to out."
            )

    def _checksum_if_sound(self, part: _Part) -> str | None:
        """Of the copy that is there; one that is not what it should be is removed."""
        path = self.folder / part.name
        try:
            note = json.loads(_note(path).read_text())
            if note["origin"] == part.origin:
                if note["stamp"] == _stamp(path):
                    return str(note["sha256"])
                if note["sha256"] == self._read_back(path):
                    _write_note(path, part.origin, note["sha256"])
                    return str(note["sha256"])
                log.warning("data.stage_to: %s: DAMAGED, copied again", path)
        except (OSError, ValueError, KeyError, TypeError):
            pass  # absent, or of a start that did not end
        path.unlink(missing_ok=True)
        return None

    def _copy(self, part: _Part) -> str:
        path = self.folder / part.name
        descriptor, aside = tempfile.mkstemp(prefix=_PARTIAL, dir=self.folder)
        try:
            digest = hashlib.sha256()
            with os.fdopen(descriptor, "wb") as file:
                for chunk in part.chunks():
                    if self._stop.is_set():
                        raise _Stopped
                    file.write(chunk)
                    digest.update(chunk)
                    with self._guard:
                        self._done += len(chunk)
                file.flush()
                os.fsync(file.fileno())
                # What is read back is then the disk's, not the system's memory of it.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if self._read_back(Path(aside)) != digest.hexdigest():
                raise DataError(
                    f"data.stage_to: {self.folder} does not give back what was written; got "
                    f"another checksum of {part.name}, expected the one of {part.origin['path']}. "
                    "Have the disk looked at, or choose another folder."
                )
            os.chmod(aside, 0o644)
            os.utime(aside, ns=(part.modified, part.modified))
            os.replace(aside, path)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(aside)
        _write_note(path, part.origin, digest.hexdigest())
        return digest.hexdigest()

    def _read_back(self, path: Path) -> str:
        digest = hashlib.sha256()
        with open(path, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                if self._stop.is_set():
                    raise _Stopped
                digest.update(chunk)
        return digest.hexdigest()


class _Stopped(Exception):
    """Another rank has failed, or another file of this one."""


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _write_note(path: Path, origin: dict[str, Any], checksum: str) -> None:
    note = {"origin": origin, "sha256": checksum, "stamp": _stamp(path)}
    aside = path.with_name(f"{_PARTIAL}{path.name}.json")
    aside.write_text(json.dumps(note))
    aside.replace(_note(path))


def _stamp(path: Path) -> list[Any]:
    """What no change of a file leaves as it was; another boot may have lost what was written."""
    status = path.stat()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, boot]


# ------------------------------------------------------------------------------------------------


def _parts(source: ImageSource) -> list[_Part]:
    if isinstance(source, TarShards):
        return [
            _of_shard(path, *stamp)
            for path, stamp in zip(source.paths, source.sizes_and_times, strict=True)
        ]
    if isinstance(source, ImageFolder):
        return [
            _of_folder(source, range(first, min(first + PICTURES_PER_PIECE, len(source))))
            for first in range(0, len(source), PICTURES_PER_PIECE)
        ]
    return []


def _name(path: str, name: str) -> str:
    """Of a copy; shards of one name in two folders are two copies."""
    folder = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
    return f"{folder}-{name[-100:]}{_ENDING}"


def _of_shard(path: str, size: int, modified: int) -> _Part:
    real = os.path.realpath(path)

    def chunks() -> Iterator[bytes]:
        done = 0
        try:
            with open(real, "rb", buffering=0) as file:
                while chunk := file.read(_CHUNK):
                    done += len(chunk)
                    yield chunk
                now = os.fstat(file.fileno())
        except OSError as error:
            raise _unreadable(real, error.strerror or str(error)) from error
        if (done, now.st_size, now.st_mtime_ns) != (size, size, modified):
            raise _unreadable(real, "a shard that changed since it was indexed")

    origin = {"path": real, "size": size, "modified": modified}
    return _Part(_name(real, os.path.basename(real)), origin, modified, lambda: size, chunks)


def _of_folder(folder: ImageFolder, indices: range) -> _Part:
    """A tar file of some of a folder's images; the same bytes on every node."""
    root = os.path.realpath(folder.root)

    def size() -> int:
        total = 2 * tarfile.BLOCKSIZE
        for index in indices:
            # A name of more than 100 bytes takes two blocks more; rounding takes at most one.
            total += 4 * tarfile.BLOCKSIZE
            with suppress(OSError):
                total += os.stat(folder[index]).st_size
        return total

    def chunks() -> Iterator[bytes]:
        for index in indices:
            try:
                encoded = bytes(folder.read(index))
            except DataError as error:
                cause = error.__cause__
                if isinstance(cause, OSError) and cause.errno in _PASSING:
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
        "first": indices.start,
        "last": indices.stop - 1,
    }
    number = indices.start // PICTURES_PER_PIECE
    name = _name(root, f"{os.path.basename(root)}-{number:05d}.tar")
    return _Part(name, origin, folder.modified, size, chunks)


def _unreadable(path: str, what: str) -> DataError:
    return DataError(
        f"data.stage_to: {path}: cannot be copied; got {what}, expected the file that data.root "
        "lists. Restore it, or start again to list it anew."
    )

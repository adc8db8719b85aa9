"""Images that are read in blocks, such as row groups of parquet files or remote tar files.

The first process of a node that needs a block fetches it into a folder on the node's disk, as one
file from which all processes of the node read single images. No process keeps a block in memory.
The blocks that the order of the epoch (`sampler.Blocks`) needs next are fetched ahead, and the
least recently used blocks are removed.

The file of a block has the bytes of the images (or a whole tar file), an index, and a trailer. The
file is written atomically.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import tempfile
import threading
import time
from abc import abstractmethod
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fd_large.data.folder import OpenFile
from fd_large.data.listing import cache_folder, locked
from fd_large.data.objects import Stored
from fd_large.data.sampler import Blocks
from fd_large.data.tar_index import NO_LABEL
from fd_large.errors import ConfigError, DataError, FDError
from fd_large.files import PARTIAL, STALE_SECONDS, kind_of
from fd_large.recipes.sections import Data

log = logging.getLogger(__name__)

# Largest number of blocks that a process holds open.
MOST_OPEN = 256
_TRAILER = struct.Struct("<qq8s")
_MAGIC = b"fdblock1"
_NUM_LOCKS = 256


class BlockWriter:
    """Writes the file of a block: the bytes of its images, and an index of where each image lies.

    Attributes:
        file: The file; its position is the end of the written bytes.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._rows = array("q")  # Start, size, label and end of the name of each image.
        self._names = bytearray()

    def add(self, name: bytes, encoded: Any) -> None:
        """Writes the bytes of an image, an object with a buffer, and records where they lie."""
        start = self.file.tell()
        self.file.write(encoded)
        self.note(name, start, self.file.tell() - start)

    def note(self, name: bytes, start: int, size: int, label: int = NO_LABEL) -> None:
        """Records where an image lies in the file, without writing the bytes of the image.

        Args:
            name: Name of the image.
            start: Offset of the image's first byte in the file.
            size: Number of bytes of the image.
            label: Class of the image, or `NO_LABEL`.
        """
        self._names += name
        self._rows.extend((start, size, label, len(self._names)))

    def finish(self) -> None:
        """Writes the index and the trailer at the end of the file."""
        self.file.seek(0, os.SEEK_END)
        columns = np.array(self._rows, np.int64).reshape(-1, 4).T
        self.file.write(columns.tobytes() + self._names)
        self.file.write(_TRAILER.pack(columns.shape[1], len(self._names), _MAGIC))


class BlockFile(OpenFile):
    """An open file of a block; its `len` is the number of images.

    Attributes:
        labels: (len,) int64, the class of each image, or `NO_LABEL` for an image without a class.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        end = os.fstat(self.number).st_size - _TRAILER.size
        trailer = os.pread(self.number, _TRAILER.size, max(0, end))
        if len(trailer) < _TRAILER.size or trailer[-len(_MAGIC) :] != _MAGIC:
            raise ValueError("not a block")
        num, num_bytes, _ = _TRAILER.unpack(trailer)
        index = os.pread(self.number, num * 32 + num_bytes, end - num * 32 - num_bytes)
        columns = np.frombuffer(index, np.int64, num * 4).reshape(4, num)
        self._starts, self._sizes, self.labels, self._name_ends = columns
        self._names = index[num * 32 :]
        os.utime(self.number)  # Marks the block as used, so that others are removed first.

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, place: int) -> str:
        """Returns the name of image `place` of the block, counted from 0."""
        start = int(self._name_ends[place - 1]) if place else 0
        return os.fsdecode(self._names[start : int(self._name_ends[place])])

    def image(self, place: int) -> bytearray:
        """Returns the bytes of image `place` of the block, counted from 0.

        Raises: OSError: if the file cannot be read.
        """
        return self.read(int(self._starts[place]), int(self._sizes[place]))


class BlockCache(NamedTuple):
    """A node's cache folder for blocks, shared by all runs on the node.

    Attributes:
        folder: The folder.
        limit_bytes: Largest total size of the blocks, in bytes; when a new block exceeds this
            limit, the least recently used blocks are removed.
    """

    folder: Path
    limit_bytes: int

    def open(
        self, key: str, make: Callable[[BlockWriter], None], *, wait: bool = True
    ) -> BlockFile | None:
        """Opens a block, and writes the block first if the cache does not have it.

        Args:
            key: Name of the block in the cache (`block_key`).
            make: Function that writes the block.
            wait: Whether to wait while another process is writing the block; if False, the function
                returns None in this case.

        Raises:
            ConfigError: if the folder cannot be written.
            Exception: any exception of `make`.
        """
        path = self.folder / f"{key}.block"
        try:
            if (block := _opened(path)) is not None:
                return block
            with locked(
                self.folder / f"{int(key[:8], 16) % _NUM_LOCKS:02x}.lock", wait=wait
            ) as mine:
                if not mine:
                    return None
                if (block := _opened(path)) is None:
                    self._write(path, make)
                    block = _opened(path)
        except OSError as error:
            raise ConfigError(
                f"data.cache: cannot be written; got {error.strerror or error} for {self.folder}, "
                "expected a folder on a local disk with room. Make room, set --data.cache FOLDER, "
                "or lower --data.cache_gb."
            ) from error
        return block or self.open(key, make, wait=wait)  # Another process may have removed it.

    def holds(self, key: str) -> bool:
        """Whether the cache has the block with the name `key`, as `block_key` returns it."""
        return kind_of(self.folder / f"{key}.block") is not None

    def _write(self, path: Path, make: Callable[[BlockWriter], None]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(prefix=PARTIAL, dir=self.folder, delete=False) as file:
            try:
                writer = BlockWriter(file)
                make(writer)
                writer.finish()
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
        self._make_room(path)

    def _make_room(self, added: Path) -> None:
        blocks, total = [], 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # Another process was faster.
                    status = entry.stat()
                    if entry.name.endswith(".block"):
                        blocks.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
                        total += status.st_size
                    elif (
                        entry.name.startswith(PARTIAL)
                        and time.time() - status.st_mtime > STALE_SECONDS
                    ):
                        os.unlink(entry.path)  # A killed process left it.
        for _, size, path in sorted(blocks):
            if total <= self.limit_bytes:
                break
            if path != added:
                path.unlink(missing_ok=True)  # Processes that have it open can still read it.
                total -= size


_cache: list[BlockCache] = []


def keep_blocks_in(folder: str, gigabytes: float) -> None:
    """Sets the folder and the size of this process's cache of blocks.

    Args:
        folder: Value of `data.cache`: a folder on a disk of the node, or "" for the folder `blocks`
            in the user's cache folder.
        gigabytes: Value of `data.cache_gb`: disk space that the blocks may take, in GB (1e9 bytes).
    """
    place = Path(folder) if folder else cache_folder() / "blocks"
    _cache[:] = [BlockCache(place, int(gigabytes * 1e9))]


def the_cache() -> BlockCache:
    """Returns this process's cache of blocks, with the default settings if none were set."""
    if not _cache:
        keep_blocks_in("", Data().cache_gb)
    return _cache[0]


class BlockImages:
    """Base class of an `ImageSource` whose images are read in blocks, in the order of the blocks.

    Args:
        files: The files or objects that contain the blocks.
        table: (num_blocks, 4) int64. Each row has the index of the block's file in `files`, the
            block's index in this file, the block's number of images (at least one), and its
            approximate size on disk in bytes.

    Attributes:
        blocks: The sizes of the blocks, and the order of an epoch over them.
        fingerprint: A hash of the samples.
        kind: Description of the dataset, for the log.
    """

    def __init__(
        self,
        files: Sequence[Stored],
        table: NDArray[np.int64],
        *,
        fingerprint: str,
        kind: str,
    ) -> None:
        self.files, self.fingerprint, self.kind = files, fingerprint, kind
        self._file_of, self._parts, self._sizes, self._num_bytes = table.T
        self.blocks = Blocks(np.cumsum(self._sizes))
        self._cache = the_cache()
        self._process = _Process()
        window = int(self._num_bytes.mean() * min(len(table), self.blocks.per_window))
        if window > self._cache.limit_bytes:
            log.warning(
                "data.cache_gb: too small for the %.1f GB of blocks that are mixed at a time, so "
                "that blocks are fetched repeatedly; got %g, expected %.1f or more. Raise "
                "--data.cache_gb",
                window / 1e9,
                self._cache.limit_bytes / 1e9,
                2 * window / 1e9,
            )

    def __len__(self) -> int:
        return int(self.blocks.ends[-1])

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"no image has index {index}; expected 0 to {len(self) - 1}")
        number, place = self.blocks.block(index)
        name = f"{self._parts[number]}/{place}"
        with suppress(DataError):
            name = self._open(number).name(place)
        return f"{self._place(number)}/{name}"

    def read(self, index: int) -> bytearray:
        """Returns the bytes of image `index`.

        Raises:
            DataError: if the block of the image cannot be used, or the image cannot be read.
            StorageError: if the block's store does not answer.
        """
        number, place = self.blocks.block(index)
        try:
            return self._open(number).image(place)
        except (DataError, OSError) as error:
            raise DataError(
                f"{self[index]}: cannot be read; got {getattr(error, 'strerror', None) or error}"
                + ("" if isinstance(error, DataError) else ", expected an image. Restore the file.")
            ) from error

    def expect(self, numbers: Sequence[int]) -> None:
        """Starts to fetch the blocks that are needed next, in a background thread.

        Args:
            numbers: Numbers of these blocks, in the order in which they are needed. Of these, the
                first ones are fetched that together take at most half of the cache's limit.
        """
        process = self._here()
        if process.wanted == (numbers := list(numbers)):
            return
        process.wanted = numbers
        if process.thread is None or not process.thread.is_alive():
            process.thread = threading.Thread(
                target=self._fetch, args=(process,), name="fetch blocks", daemon=True
            )
            process.thread.start()

    @abstractmethod
    def _make(self, stored: Stored, part: int, writer: BlockWriter) -> None:
        """Writes block `part` of a file, and raises DataError if the file cannot be used."""

    def _place(self, number: int) -> str:
        return self.files[self._file_of[number]].url

    def _fetched(self, number: int, *, wait: bool) -> BlockFile | None:
        make = partial(self._make, *self._where_is(number))
        return self._cache.open(block_key(*self._where_is(number)), make, wait=wait)

    def _where_is(self, number: int) -> tuple[Stored, int]:
        return self.files[self._file_of[number]], int(self._parts[number])

    def _open(self, number: int) -> BlockFile:
        process = self._here()
        if (failure := process.failed.get(number)) is not None:
            raise DataError(failure)
        block = process.open.pop(number, None)
        if block is None:
            try:
                block = self._fetched(number, wait=True)
                assert block is not None
                if len(block) != self._sizes[number]:
                    raise DataError(
                        f"a file of {len(block)} images, expected {self._sizes[number]}. The file "
                        "changed since it was listed: start again."
                    )
            except DataError as error:
                process.failed[number] = str(error)
                raise
        process.open[number] = block
        while len(process.open) > MOST_OPEN:
            process.open.popitem(last=False)
        return block

    def _fetch(self, process: _Process) -> None:
        numbers: list[int] = []
        while numbers is not process.wanted:
            numbers, room = process.wanted, self._cache.limit_bytes / 2
            for number in numbers:
                room -= int(self._num_bytes[number])
                if numbers is not process.wanted or room < 0:
                    break
                key = block_key(*self._where_is(number))
                if number in process.failed or self._cache.holds(key):
                    continue
                try:
                    self._fetched(number, wait=False)
                except FDError as error:  # Reading the block will raise the error again.
                    log.debug("not fetched ahead: %s", error)
                    return

    def _here(self) -> _Process:
        if self._process.pid != os.getpid():  # A forked process has no threads of its parent.
            self._process = _Process()
        return self._process

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_process": _Process()}


class _Process:
    """The open blocks and the background thread of a dataset in one process.

    Attributes:
        open: Open blocks by number, the least recently used first.
        failed: Error messages of the blocks that could not be used, by number.
        wanted: Numbers of the blocks that the background thread is to fetch.
        thread: The background thread, or None before the first call of `expect`.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.open: OrderedDict[int, BlockFile] = OrderedDict()
        self.failed: dict[int, str] = {}
        self.wanted: list[int] = []
        self.thread: threading.Thread | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _Process, ()


def block_key(stored: Stored, part: int) -> str:
    """Returns the name in the cache of block `part` of a file.

    The name depends on the path or URL of the file, its size in bytes, and its modification time or
    ETag.
    """
    text = f"{stored!r} {part}"
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _opened(path: Path) -> BlockFile | None:
    try:
        return BlockFile(path)
    except FileNotFoundError:
        return None
    except ValueError:  # A crash of the machine cut it short.
        path.unlink(missing_ok=True)
        return None

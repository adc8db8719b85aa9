"""The files of cached targets: a header, and shards of records of one size.

FOLDER/cache.json says what is stored. FOLDER/SET-SHARD.safetensors holds the records of a set that
begin at SHARD times `records_per_shard`, one of each image; a set is a view of all images. The
tensors of a shard have a row for each record:

    values (R, N, C)    the tokens, see precision.py
    scales (R, N, 2)    shift and factor of each token; (R, N, 0) under fp32
    thumbnails (R, 64)  uint8, the view in grey, 8 x 8: whether it is the one that training sees
    checks (R,)         int64, what the record is and the CRC-32 of its bytes; 0: not written yet

The bytes before the first tensor follow from cache.json, so a reader compares them and parses
nothing. A shard that is being written ends in .part; any process may write any record of it, once.
Files are written and read by the system's own calls (checkpoint/tensor_file.py says why).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large import files
from fd_large.checkpoint.tensor_file import Place, header_of
from fd_large.errors import CacheError
from fd_large.files import kind_of, retried, write_json
from fd_large.tasks.distillation.cached.precision import PRECISIONS, Stored, num_scales

HEADER = "cache.json"
KIND = "fd_large cached targets 1"
SIDE = 8
"""Side of a thumbnail, in pixels."""
THUMBNAIL = SIDE**2
SHARD_BYTES = 1 << 28
_MOST_OPEN = 128
_MAP, _UNUSABLE = 1, 2
"""What a record is; none is 0."""


class Record(NamedTuple):
    """What is stored of the view of an image.

    Attributes:
        map: Its tokens, (N, C), in host memory.
        thumbnail: (64,) uint8.
    """

    map: Stored
    thumbnail: Tensor


class Layout(NamedTuple):
    """A shard's file.

    Attributes:
        name: Its name.
        first: Its first record.
        count: How many it has.
        header: The bytes before its first tensor.
        places: Where its tensors lie.
        size: Its bytes in all.
    """

    name: str
    first: int
    count: int
    header: bytes
    places: Mapping[str, Place]
    size: int


@dataclass(frozen=True)
class Header:
    """What is stored in a cache; cache.json holds it.

    Attributes:
        facts: What decides the maps, by the name of the field or file that says it: teacher, images
            and views. A run must have the same.
        teacher: The teacher's section of the recipe that wrote it.
        precision: How the maps are stored: a name in `PRECISIONS`.
        tokens: Tokens of a map, N.
        width: Its channels, C.
        grid: Rows and columns of its patches.
        prefix_tokens: Tokens before the patches.
        dtype: Type in which the teacher gives its map: float32 or bfloat16.
        sets: Records of each set.
        records_per_shard: Records of a shard; the last one of a set may have fewer.
    """

    facts: Mapping[str, Any]
    teacher: Mapping[str, Any]
    precision: str
    tokens: int
    width: int
    grid: tuple[int, int]
    prefix_tokens: int
    dtype: str
    sets: Mapping[str, int]
    records_per_shard: int

    @cached_property
    def digest(self) -> str:
        """A hash of all of it."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def record_bytes(self) -> int:
        """Bytes of a record."""
        rows = self.rows(1).values()
        return sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in rows)

    @property
    def total_bytes(self) -> int:
        """Bytes of all shards."""
        return sum(self.layout(*shard).size for shard in self.shards())

    def rows(self, count: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Returns type and shape of the tensors of a shard of so many records."""
        scales = num_scales(self.precision)
        return {
            "values": (PRECISIONS[self.precision], (count, self.tokens, self.width)),
            "scales": (torch.float32, (count, self.tokens, scales)),
            "thumbnails": (torch.uint8, (count, THUMBNAIL)),
            "checks": (torch.int64, (count,)),
        }

    def shards(self) -> Iterator[tuple[str, int]]:
        """Yields (set, number) of all shards."""
        for name, count in self.sets.items():
            yield from ((name, number) for number in range(-(-count // self.records_per_shard)))

    def layout(self, name: str, number: int) -> Layout:
        """Returns how a shard lies on disk."""
        first = number * self.records_per_shard
        count = min(self.records_per_shard, self.sets[name] - first)
        header, places = header_of(
            self.rows(count), {"cache": self.digest, "set": name, "first_record": str(first)}
        )
        size = max(place.stop for place in places.values())
        return Layout(f"{name}-{number:05d}.safetensors", first, count, header, places, size)

    def to_dict(self) -> dict[str, Any]:
        """Returns what cache.json holds."""
        return {"kind": KIND, "digest": self.digest, **asdict(self)}

    @classmethod
    def read(cls, folder: Path, *, where: str) -> Header:
        """Reads the header of a cache.

        Args:
            folder: The cache.
            where: The field that names it, for messages.

        Raises: CacheError: if there is none, or it is damaged.
        """
        path = folder / HEADER
        remedy = "Name a folder that fd-large cache has written, or write it again."
        stored = files.read_json(path, where=where, holds=dict, remedy=remedy, of=CacheError)
        try:
            if stored.pop("kind") != KIND:
                raise ValueError("another kind of file")
            digest = stored.pop("digest")
            header = cls(**{**stored, "grid": tuple(stored["grid"])})
            if header.digest != digest:
                raise ValueError(f"a content of hash {header.digest} that says {digest}")
            return header
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{where}: {path}: no header of cached targets; got {error}, expected what "
                f"fd-large cache has written. {remedy}"
            ) from error


def records_per_shard(record_bytes: int) -> int:
    """Returns how many records make a shard of about `SHARD_BYTES`."""
    return max(1, SHARD_BYTES // record_bytes)


class _File:
    """An open shard."""

    def __init__(self, path: Path, layout: Layout, flags: int) -> None:
        self.path, self.layout = path, layout
        self.descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)

    def close(self) -> None:
        os.close(self.descriptor)

    def fill(self, array: NDArray, name: str, row: int) -> None:
        """Fills an array with a tensor's rows from one on."""
        view = memoryview(array.reshape(-1).view(np.uint8)) if array.size else memoryview(b"")
        offset = self._offset(name, row)
        while len(view):
            count = retried(lambda v=view, o=offset: os.preadv(self.descriptor, [v], o), self.path)
            if count == 0:
                raise OSError(errno.EIO, "ends early", str(self.path))
            view, offset = view[count:], offset + count

    def put(self, array: NDArray, name: str, row: int) -> None:
        """Writes a tensor's rows from one on."""
        view = memoryview(array.reshape(-1).view(np.uint8)) if array.size else memoryview(b"")
        offset = self._offset(name, row)
        while len(view):
            count = retried(lambda v=view, o=offset: os.pwrite(self.descriptor, v, o), self.path)
            view, offset = view[count:], offset + count

    def _offset(self, name: str, row: int) -> int:
        place = self.layout.places[name]
        return place.start + row * ((place.stop - place.start) // self.layout.count)


class _Files:
    """Open shards of one folder; those used longest ago are closed."""

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder, self.header = folder, header
        self._open: OrderedDict[tuple[str, int], _File] = OrderedDict()

    def __reduce__(self) -> Any:  # Each process opens its own.
        return type(self), (self.folder, self.header)

    def close(self) -> None:
        """Closes all files."""
        while self._open:
            self._open.popitem()[1].close()

    def _file(self, name: str, number: int) -> _File:
        key = name, number
        if key not in self._open:
            if len(self._open) >= _MOST_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[key] = self._opened(name, number)
        self._open.move_to_end(key)
        return self._open[key]

    def _opened(self, name: str, number: int) -> _File:
        raise NotImplementedError

    def _place(self, name: str, record: int) -> tuple[_File, int]:
        """The open shard of a record, and its row there."""
        number, row = divmod(record, self.header.records_per_shard)
        return self._file(name, number), row

    def _empty(self, rows: int) -> dict[str, NDArray]:
        """Arrays of rows of bytes of what a check covers."""
        return {
            tensor: np.empty((rows, int(np.prod(shape[1:])) * dtype.itemsize), np.uint8)
            for tensor, (dtype, shape) in self.header.rows(1).items()
            if tensor != "checks"
        }


class CacheReader(_Files):
    """Reads records, each held against its checksum. It can be pickled.

    Args:
        folder: The cache.
        header: Its header.
    """

    def check_whole(self, *, where: str) -> None:
        """Looks at the names and sizes of all shards.

        Args:
            where: The field that names the cache, for messages.

        Raises: CacheError: if a shard is missing, or was cut.
        """
        sizes = {
            entry.name: entry.stat().st_size
            for entry in retried(lambda: list(os.scandir(self.folder)), self.folder)
        }
        layouts = [self.header.layout(*shard) for shard in self.header.shards()]
        missing = [layout.name for layout in layouts if layout.name not in sizes]
        if missing:
            raise CacheError(
                f"{where}: {self.folder}: not finished; got {len(layouts) - len(missing)} of "
                f"{len(layouts)} shards ({missing[0]} is missing), expected all. Give the command "
                "that wrote it once more: it goes on where it was."
            )
        for layout in layouts:
            if sizes[layout.name] != layout.size:
                path = self.folder / layout.name
                raise _damaged(path, f"{sizes[layout.name]:,} bytes", f"{layout.size:,}")

    def read(self, name: str, record: int) -> Record | None:
        """Returns a record; None: its image could not be used when the cache was written.

        Raises: CacheError: if the file is damaged, with its name and the record.
        """
        file, row = self._place(name, record)
        rows = self._empty(1)
        try:
            for tensor, array in rows.items():
                file.fill(array, tensor, row)
            check = np.empty(1, np.int64)
            file.fill(check, "checks", row)
        except OSError as error:
            raise _damaged(file.path, f"{error}", "a whole file", record) from error
        expected = _check(name, record, rows, int(check[0]) >> 32)
        if check[0] != expected or not expected >> 32:
            got = f"bytes of checksum {expected & 0xFFFFFFFF:08x}"
            raise _damaged(file.path, got, f"{int(check[0]) & 0xFFFFFFFF:08x}", record)
        if expected >> 32 == _UNUSABLE:
            return None
        made = {}
        for tensor, (dtype, shape) in self.header.rows(1).items():
            if tensor != "checks":
                flat = torch.from_numpy(rows[tensor][0])
                # An empty tensor cannot be viewed as another type.
                made[tensor] = (flat.view(dtype) if len(flat) else flat.to(dtype)).view(shape[1:])
        return Record(Stored(made["values"], made["scales"]), made["thumbnails"])

    def _opened(self, name: str, number: int) -> _File:
        layout = self.header.layout(name, number)
        path = self.folder / layout.name
        try:
            file = _File(path, layout, os.O_RDONLY)
        except OSError as error:
            raise _damaged(path, f"{error}", "a file that can be read") from error
        header = retried(lambda: os.pread(file.descriptor, len(layout.header), 0), path)
        size = os.fstat(file.descriptor).st_size
        if header != layout.header or size != layout.size:
            file.close()
            got = f"{size:,} bytes" if header == layout.header else "a header of other bytes"
            raise _damaged(path, got, f"{layout.size:,} bytes and the header that {HEADER} gives")
        return file


class CacheWriter(_Files):
    """Writes records, in any order and from any number of processes; see `prepare`.

    Args:
        folder: The cache.
        header: What is to be stored.
    """

    def prepare(self, *, where: str) -> None:
        """Makes the folder and its header, or goes on in it; one process calls it before all write.

        Raises: CacheError: if the folder holds another cache, or cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not kind_of(self.folder / HEADER):
                write_json(self.folder / HEADER, self.header.to_dict())
        except OSError as error:
            raise CacheError(
                f"{where}: cannot be used; got {error}, expected a folder that can be written. "
                "Choose another."
            ) from error
        stored = Header.read(self.folder, where=where)
        if stored.digest != self.header.digest:
            raise CacheError(
                f"{where}: {self.folder}: holds maps that another command stores; got "
                f"{_other_maps(stored, self.header)}, expected the same. Give the command that "
                "began it, or another folder."
            )

    def unfinished(self, only: str = "") -> list[tuple[str, int]]:
        """Returns (set, number) of the shards, of one set or of all, that are not whole yet."""
        return [
            (name, number)
            for name, number in self.header.shards()
            if only in ("", name)
            and not kind_of(self.folder / self.header.layout(name, number).name)
        ]

    def bytes_left(self) -> int:
        """Returns the bytes that the disk must still take."""
        left = 0
        for shard in self.unfinished():
            layout = self.header.layout(*shard)
            part = self._part(layout)
            held = part.stat().st_blocks * 512 if kind_of(part) else 0
            left += max(0, layout.size - held)
        return left

    def unwritten(self, name: str, number: int) -> Sequence[int]:
        """Returns the records of a shard that are not there, or were not written whole.

        Among them are those whose image could not be used: it is tried again.
        """
        layout = self.header.layout(name, number)
        numbers = range(layout.first, layout.first + layout.count)
        if not kind_of(self._part(layout)):
            return numbers
        file = self._file(name, number)
        checks = np.empty(layout.count, np.int64)
        file.fill(checks, "checks", 0)
        rows, missing = self._empty(1), []
        for row, record in enumerate(numbers):
            is_map = checks[row] >> 32 == _MAP
            if is_map:
                for tensor, array in rows.items():
                    file.fill(array, tensor, row)
            if not is_map or checks[row] != _check(name, record, rows, _MAP):
                missing.append(record)
        return missing

    def write(self, name: str, record: int, content: Record | None) -> None:
        """Writes a record; None: its image cannot be used.

        Raises: CacheError: if the disk does not take it.
        """
        rows = self._empty(1)
        if content is None:
            state = _UNUSABLE
            for array in rows.values():
                array.fill(0)
        else:
            state = _MAP
            parts = (*content.map, content.thumbnail)
            for array, part in zip(rows.values(), parts, strict=True):
                array[0] = part.contiguous().view(-1).view(torch.uint8).numpy()
        try:
            file, row = self._place(name, record)
            for tensor, array in rows.items():
                file.put(array, tensor, row)
            # Last: a record counts once its check is there.
            check = np.array([_check(name, record, rows, state)], np.int64)
            file.put(check, "checks", row)
        except OSError as error:
            raise _not_written(self.folder, error) from error

    def finish(self, name: str, number: int) -> None:
        """Gives a shard whose records are all written its name; the disk then holds it."""
        layout = self.header.layout(name, number)
        try:
            file = self._file(name, number)
            os.fsync(file.descriptor)
            self._open.pop((name, number)).close()
            self._part(layout).replace(self.folder / layout.name)
        except OSError as error:
            if kind_of(self.folder / layout.name):
                return  # Another start writes the same, and was faster.
            raise _not_written(self.folder, error) from error

    def _part(self, layout: Layout) -> Path:
        return self.folder / f"{layout.name}.part"

    def _opened(self, name: str, number: int) -> _File:
        layout = self.header.layout(name, number)
        file = _File(self._part(layout), layout, os.O_RDWR | os.O_CREAT)
        # The same bytes, whichever process comes first.
        os.pwrite(file.descriptor, layout.header, 0)
        os.ftruncate(file.descriptor, layout.size)
        return file


def differences(stored: Mapping[str, Any], own: Mapping[str, Any], prefix: str = "") -> str:
    """Returns what differs between two mappings in words: "NAME is A there and B here, ..."."""
    found = []
    for name in {**own, **stored}:
        there, here = stored.get(name), own.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            found += [differences(there, here, f"{name}: ")] if there != here else []
        elif there != here:
            found.append(f"{prefix}{name} {there!r} there and {here!r} here")
    return ", ".join(found)


def _other_maps(stored: Header, own: Header) -> str:
    """Returns what differs between two headers, without what follows from it."""
    words = {"teacher_hash": "hash of the teacher's weights", "stored": "kind of map"}
    facts, sections, all_ = [], [], []
    for header in (stored, own):
        said = {words.get(name, name): value for name, value in header.facts.items()}
        facts.append(said | {"precision": header.precision, "type of the maps": header.dtype})
        sections.append({f"teacher.{name}": value for name, value in header.teacher.items()})
        all_.append(asdict(header))
    return differences(*facts) or differences(*sections) or differences(*all_)


def _check(name: str, record: int, rows: Mapping[str, NDArray], state: int) -> int:
    """What a record's check is: its state above the CRC-32 of its place and bytes."""
    value = zlib.crc32(f"{name} {record}".encode())
    for array in rows.values():
        value = zlib.crc32(array, value)
    return int(state) << 32 | value


def _damaged(path: Path, got: str, expected: str, record: int | None = None) -> CacheError:
    of = "" if record is None else f" record {record}:"
    error = CacheError(
        f"{path}:{of} damaged; got {got}, expected {expected}. Remove this file and give the "
        "command that wrote it once more: it writes what is missing."
    )
    error.rank_local = True
    return error


def _not_written(folder: Path, error: OSError) -> CacheError:
    refused = CacheError(
        f"{folder}: cannot be written; got {error}, expected room for the cache. What is written "
        "stays: give the same command again once there is."
    )
    refused.rank_local = True
    return refused

"""The files of a cache of teachers' maps: a header, and shards of records of equal size.

FOLDER/cache.json describes the contents. A record is the stored map of a view of an image. A set
holds the records of all images for one view of each. FOLDER/SET-SHARD.safetensors holds the records
of a set from number SHARD * `records_per_shard` on. The tensors of a shard have a row for each of
its R records; a map has N tokens of C channels:

    values (R, N, C)    the tokens, in a type of `PRECISIONS`
    scales (R, N, 2)    shift and factor of each token; (R, N, 0) under fp32
    thumbnails (R, 64)  uint8, the view in grey, 8 x 8, to compare with the view of training
    checks (R,)         int64, the record's state and CRC-32 (`check_of`); 0: not written yet

The bytes before the first tensor follow from cache.json, so that a reader only compares them. The
name of a shard ends in .part until it is complete; each record is written once, by any process.
Files are written and read by system calls (checkpoint/tensor_file.py says why).

In all precisions but fp32 each token is encoded by a float32 shift, which is subtracted, and a
float32 factor, which divides the difference. So no channel is too large for the format, small and
large tokens have the same relative precision, and no statistics of the dataset are needed. Under
fp16 and fp8 (E4M3) shift and factor are the token's mean and standard deviation, as in whitening.
Under int8 they are the middle of the token's range and a 254th of the range.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large import files
from fd_large.checkpoint.tensor_file import Place, header_of
from fd_large.errors import CacheError
from fd_large.files import retried

HEADER = "cache.json"
KIND = "fd_large cached targets 1"
SIDE = 8
"""Side of a thumbnail, in pixels."""
THUMBNAIL = SIDE**2
SHARD_BYTES = 1 << 28
_MOST_OPEN = 128
MAP, UNUSABLE = 1, 2
"""States of a written record: it holds a map, or its image could not be used. 0: not written."""

PRECISIONS: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}


class Stored(NamedTuple):
    """Encoded tokens as stored in a cache.

    Attributes:
        values: (..., N, C), of the precision's type in `PRECISIONS`.
        scales: (..., N, 2) float32, shift and factor of each token; (..., N, 0) under fp32.
    """

    values: Tensor
    scales: Tensor


def num_scales(precision: str) -> int:
    """Returns how many scales `precision` stores for each token: 0 for "fp32", else 2."""
    return 0 if precision == "fp32" else 2


def encode(tokens: Tensor, precision: str) -> Stored:
    """Returns tokens encoded for storage.

    Args:
        tokens: (..., N, C), float32 or a narrower type.
        precision: A name in `PRECISIONS`.
    """
    tokens, dtype = tokens.float(), PRECISIONS[precision]
    if not num_scales(precision):
        return Stored(tokens, tokens.new_empty(*tokens.shape[:-1], 0))
    if precision == "int8":
        low, high = tokens.aminmax(dim=-1, keepdim=True)
        shift, factor = (high + low) / 2, (high - low) / 254
    else:
        shift = tokens.mean(-1, keepdim=True)
        factor = (tokens - shift).square().mean(-1, keepdim=True).sqrt()
    factor = torch.where(factor > 0, factor, 1.0)
    scaled = (tokens - shift) / factor
    if dtype.is_floating_point:
        most = torch.finfo(dtype).max  # Beyond it E4M3 has no infinity, but NaN.
        values = scaled.clamp(-most, most).to(dtype)
    else:
        values = scaled.round().clamp(-127, 127).to(dtype)
    return Stored(values, torch.cat([shift, factor], -1))


def decode(stored: Stored, dtype: torch.dtype) -> Tensor:
    """Returns the tokens that `stored` encodes, (..., N, C), converted to `dtype`."""
    values, scales = stored
    if not scales.shape[-1]:
        return values.to(dtype)
    shift, factor = scales[..., :1], scales[..., 1:]
    return (shift + factor * values.float()).to(dtype)


class Record(NamedTuple):
    """The stored map and thumbnail of a view of an image.

    Attributes:
        map: Tokens of the map, (N, C), in host memory.
        thumbnail: (64,) uint8, the view in grey, 8 x 8 pixels row by row.
    """

    map: Stored
    thumbnail: Tensor


class Layout(NamedTuple):
    """Name, records and size of a shard's file.

    Attributes:
        name: Name of the file.
        first: Number of the shard's first record, as counted in the set.
        count: Number of records in the shard.
        header: The bytes before the first tensor.
        places: Range of bytes of each tensor in the file, by the tensor's name.
        size: Size of the file in bytes.
    """

    name: str
    first: int
    count: int
    header: bytes
    places: Mapping[str, Place]
    size: int


@dataclass(frozen=True)
class Header:
    """Description of a cache's contents, stored as cache.json.

    Attributes:
        facts: The settings that decide the maps (teacher, images, views), as {name: value}; a name
            is a field of the recipe, or words such as "seed of the views". A run that reads the
            cache must have the same settings.
        teacher: The section `teacher` of the recipe that wrote the cache.
        precision: Precision of the stored maps, a name in `PRECISIONS`.
        tokens: Number of tokens of a map, N.
        width: Number of channels of a map, C.
        grid: Rows and columns of a map's patches.
        prefix_tokens: Number of tokens before the patches.
        dtype: Data type of the teacher's map, float32 or bfloat16.
        sets: Number of records in each set, by the set's name.
        records_per_shard: Number of records of a shard; the last shard of a set may have fewer.
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
        """A hash of the whole header."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def record_bytes(self) -> int:
        """Size of a record in bytes, over all tensors of a shard."""
        rows = self.rows(1).values()
        return sum(int(np.prod(shape)) * dtype.itemsize for dtype, shape in rows)

    @property
    def total_bytes(self) -> int:
        """Size of all shards of the cache, in bytes."""
        return sum(self.layout(*shard).size for shard in self.shards())

    def rows(self, count: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Returns the data type and shape of each tensor of a shard, by the tensor's name.

        Args:
            count: Number of records in the shard.
        """
        scales = num_scales(self.precision)
        return {
            "values": (PRECISIONS[self.precision], (count, self.tokens, self.width)),
            "scales": (torch.float32, (count, self.tokens, scales)),
            "thumbnails": (torch.uint8, (count, THUMBNAIL)),
            "checks": (torch.int64, (count,)),
        }

    def shards(self) -> Iterator[tuple[str, int]]:
        """Yields (name of its set, its number in the set, from 0) for each shard of the cache."""
        for name, count in self.sets.items():
            yield from ((name, number) for number in range(-(-count // self.records_per_shard)))

    def layout(self, name: str, number: int) -> Layout:
        """Returns the layout of the file of a shard.

        Args:
            name: Name of the set.
            number: Number of the shard in the set.
        """
        first = number * self.records_per_shard
        count = min(self.records_per_shard, self.sets[name] - first)
        header, places = header_of(
            self.rows(count), {"cache": self.digest, "set": name, "first_record": str(first)}
        )
        size = max(place.stop for place in places.values())
        return Layout(f"{name}-{number:05d}.safetensors", first, count, header, places, size)

    def to_dict(self) -> dict[str, Any]:
        """Returns the contents of cache.json, from which `read` makes the header."""
        return {"kind": KIND, "digest": self.digest, **asdict(self)}

    @classmethod
    def read(cls, folder: Path, *, where: str) -> Header:
        """Reads the header of a cache.

        Args:
            folder: Folder of the cache.
            where: The recipe's field that names the folder, for messages.

        Raises: CacheError: if the header is missing or damaged.
        """
        path = folder / HEADER
        remedy = "Name a folder that fd-large cache wrote, or write the cache again."
        stored = files.read_json(path, where=where, holds=dict, remedy=remedy, of=CacheError)
        try:
            if stored.pop("kind") != KIND:
                raise ValueError("another kind of file")
            digest = stored.pop("digest")
            header = cls(**{**stored, "grid": tuple(stored["grid"])})
            if header.digest != digest:
                raise ValueError(f"contents with the hash {header.digest} instead of {digest}")
            return header
        except (ValueError, KeyError, TypeError) as error:
            raise CacheError(
                f"{where}: {path}: not a header of cached targets; got {error}, expected a header "
                f"that fd-large cache wrote. {remedy}"
            ) from error


def records_per_shard(record_bytes: int) -> int:
    """Returns the number of records that fill a shard of about `SHARD_BYTES`, at least 1.

    Args:
        record_bytes: Size of a record.
    """
    return max(1, SHARD_BYTES // record_bytes)


class ShardFile:
    """An open file of a shard.

    Args:
        path: Path of the file.
        layout: Layout of the shard.
        flags: Flags of `os.open`.
    """

    def __init__(self, path: Path, layout: Layout, flags: int) -> None:
        self.path, self.layout = path, layout
        self.descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)

    def close(self) -> None:
        """Closes the file."""
        os.close(self.descriptor)

    def begin(self) -> None:
        """Writes the shard's header, and sets the file's final size.

        Several processes may call this method for the same file.
        """
        self._move(self._write, memoryview(self.layout.header), 0)
        os.ftruncate(self.descriptor, self.layout.size)

    def fill(self, array: NDArray, name: str, row: int) -> None:
        """Reads rows of a tensor into an array.

        Args:
            array: The array that is filled, whose size decides how many bytes are read.
            name: The tensor's name.
            row: The first row of the tensor that is read.
        """
        self._move(self._read, *self._place(array, name, row))

    def put(self, array: NDArray, name: str, row: int) -> None:
        """Writes an array into rows of a tensor.

        Args:
            array: The array, whose size decides how many bytes are written.
            name: The tensor's name.
            row: The first row of the tensor that is written.
        """
        self._move(self._write, *self._place(array, name, row))

    def _read(self, view: memoryview, at: int) -> int:
        return os.preadv(self.descriptor, [view], at)

    def _write(self, view: memoryview, at: int) -> int:
        return os.pwrite(self.descriptor, view, at)

    def _place(self, array: NDArray, name: str, row: int) -> tuple[memoryview, int]:
        """Returns (the bytes of `array`, position in the file of row `row` of the tensor `name`).

        The bytes are a view of the array's memory; the position is counted in bytes.
        """
        place = self.layout.places[name]
        at = place.start + row * ((place.stop - place.start) // self.layout.count)
        return memoryview(array.reshape(-1).view(np.uint8) if array.size else b""), at

    def _move(self, call: Callable[[memoryview, int], int], view: memoryview, at: int) -> None:
        """Repeats a system call until all bytes of a buffer are read or written.

        Args:
            call: Reads or writes a part of a buffer at a position in the file, and returns the
                number of bytes that it moved.
            view: The buffer.
            at: Position in the file, in bytes.

        Raises: OSError: if the file ends early.
        """
        while len(view):
            count = retried(partial(call, view, at), self.path)
            if count == 0:
                raise OSError(errno.EIO, "ends early", str(self.path))
            view, at = view[count:], at + count


class ShardFiles:
    """The shards of a cache, of which at most `_MOST_OPEN` are open at a time.

    To open another shard, the least recently used shard is closed.

    Args:
        folder: Folder of the cache.
        header: Header of the cache.
    """

    def __init__(self, folder: Path, header: Header) -> None:
        self.folder, self.header = folder, header
        self._open: OrderedDict[tuple[str, int], ShardFile] = OrderedDict()

    def __reduce__(self) -> Any:  # Each process opens its own.
        return type(self), (self.folder, self.header)

    def close(self) -> None:
        """Closes all files."""
        while self._open:
            self._open.popitem()[1].close()

    def _file(self, name: str, number: int) -> ShardFile:
        """Returns the open file of shard `number` of the set `name`, and opens it if necessary.

        If `_MOST_OPEN` files are open already, the least recently used of them is closed first.
        """
        key = name, number
        if key not in self._open:
            if len(self._open) >= _MOST_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[key] = self._opened(name, number)
        self._open.move_to_end(key)
        return self._open[key]

    def _opened(self, name: str, number: int) -> ShardFile:
        """Opens the file of shard `number` of the set `name`; a subclass defines how."""
        raise NotImplementedError

    def _place(self, name: str, record: int) -> tuple[ShardFile, int]:
        """Returns the open file of the shard with a record, and the record's row in the shard.

        Args:
            name: Name of the record's set.
            record: Number of the record in the set.
        """
        number, row = divmod(record, self.header.records_per_shard)
        return self._file(name, number), row

    def _empty(self, rows: int) -> dict[str, NDArray]:
        """Returns uninitialised byte arrays for the tensors of a shard except `checks`, by name.

        Each array is (rows, bytes of a record in this tensor) uint8.

        Args:
            rows: Number of records.
        """
        return {
            tensor: np.empty((rows, int(np.prod(shape[1:])) * dtype.itemsize), np.uint8)
            for tensor, (dtype, shape) in self.header.rows(1).items()
            if tensor != "checks"
        }


def differences(stored: Mapping[str, Any], expected: Mapping[str, Any], prefix: str = "") -> str:
    """Returns how mappings differ in words, such as "NAME 'A' in the cache but 'B' here".

    Differences in nested mappings are listed too. The result is "" if the mappings are equal.

    Args:
        stored: The mapping from the cache.
        expected: The mapping whose values are called "here".
        prefix: Words before each name.
    """
    phrases = []
    for name in {**expected, **stored}:
        there, here = stored.get(name), expected.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping):
            phrases += [differences(there, here, f"{name}: ")] if there != here else []
        elif there != here:
            phrases.append(f"{prefix}{name} {there!r} in the cache but {here!r} here")
    return ", ".join(phrases)


def check_of(name: str, record: int, rows: Mapping[str, NDArray], state: int) -> int:
    """Returns the check of a record, an integer of 64 bits.

    The upper 32 bits are the record's state. The lower 32 bits are a CRC-32 over the name of the
    set, the number of the record and the record's bytes.

    Args:
        name: Name of the record's set.
        record: Number of the record in the set.
        rows: The record's bytes in each tensor except `checks`.
        state: `MAP` or `UNUSABLE`.
    """
    value = zlib.crc32(f"{name} {record}".encode())
    for array in rows.values():
        value = zlib.crc32(array, value)
    return int(state) << 32 | value


def damaged(path: Path, got: str, expected: str, record: int | None = None) -> CacheError:
    """Returns the error for a damaged shard, marked as an error of this rank alone.

    Args:
        path: The shard.
        got: What was read.
        expected: What was expected.
        record: Number of the damaged record; None for the whole shard.
    """
    of = "" if record is None else f" record {record}:"
    error = CacheError(
        f"{path}:{of} damaged; got {got}, expected {expected}. Remove this file and repeat the "
        "command that wrote it: it writes the missing maps."
    )
    error.rank_local = True
    return error

"""Files of tensors in the safetensors format, written and read by plain system calls.

The safetensors library is not enough, because a checkpoint needs the errno of a failed call (the
library raises an error with a text alone, and a read error of a mapped file is a signal that ends
the process), reads of a few bytes from many files, and checksums of parts during the write.
"""

from __future__ import annotations

import errno
import json
import math
import os
import zlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fd_large.files import parse_json
from fd_large.weights.read import DTYPES

CHUNK = 1 << 24
TENSORS_A_CALL = 512
"""Number of tensors that one system call writes; the system allows 1024."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Place(NamedTuple):
    """Place of a tensor in its file.

    Attributes:
        dtype: Data type of the tensor.
        start: Offset of its first byte in the file.
        stop: Offset after its last byte.
    """

    dtype: torch.dtype
    start: int
    stop: int


class Checksums(NamedTuple):
    """CRC-32 of a file and of its parts, stored in a receipt: eight hexadecimal digits each.

    Attributes:
        file: Checksum of the whole file.
        header: Checksum of the bytes before the first tensor.
        kinds: Checksum of the concatenated tensors of each kind; the kind is the part of a name
            before its first dot.
    """

    file: str
    header: str
    kinds: dict[str, str]


def header_of(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, Place]]:
    """Returns the bytes before the first tensor of a file, and the tensors' places, in order.

    Args:
        tensors: Data type and shape by name.
        metadata: Further texts of the header, by name.
    """
    # As the library does: the widest first, so that each lies on a multiple of its own width.
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        (dtype, shape), start = tensors[name], end
        end += math.prod(shape) * dtype.itemsize
        table[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    return header, _places(table, len(header))


def write(path: Path, tensors: Mapping[str, Tensor]) -> Checksums:
    """Writes and flushes a file with the mode that the user's umask gives.

    Args:
        path: The file.
        tensors: Contiguous, in host memory, by name.

    Raises: OSError: if it cannot be written; the file is then incomplete.
    """
    header, places = header_of({name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()})
    order = list(places)
    whole, kinds = zlib.crc32(header), dict.fromkeys(map(_kind, order), 0)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    try:
        waiting = [memoryview(header)]
        for name in order:
            view = tensors[name].view(-1).view(torch.uint8).numpy().data
            whole = zlib.crc32(view, whole)
            kinds[_kind(name)] = zlib.crc32(view, kinds[_kind(name)])
            waiting.append(view)
            # Many tensors are small, and a call for each is slow on a shared file system.
            if len(waiting) == TENSORS_A_CALL or sum(map(len, waiting)) >= CHUNK:
                _write_all(descriptor, waiting)
        _write_all(descriptor, waiting)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return Checksums(_hex(whole), _hex(zlib.crc32(header)), {k: _hex(v) for k, v in kinds.items()})


class TensorFile:
    """An open file of tensors. Its descriptor stays open until `close`.

    Args:
        path: The file.
        headers: Parsed tables by header bytes, extended here: the files of a run's ranks have
            nearly equal headers, and thousands of parsed tables would fill memory.

    Raises: OSError: if it cannot be read; ValueError: if it is not such a file.
    """

    def __init__(self, path: Path, headers: dict[bytes, dict[str, Place]] | None = None) -> None:
        headers = {} if headers is None else headers
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            size = int.from_bytes(self._bytes(0, 8), "little")
            if size > os.fstat(self._descriptor).st_size:
                raise ValueError("invalid length of the header")
            self.header = self._bytes(0, 8 + size)
            if self.header not in headers:
                headers[self.header] = _places(parse_json(self.header[8:]), 8 + size)
            self.places = headers[self.header]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the descriptor; a second time does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def read_into(self, out: Tensor, name: str, start: int) -> None:
        """Fills a flat float32 tensor with elements of a stored one, from `start` on."""
        dtype, begin, _ = self.places[name]
        values = out if dtype == out.dtype else torch.empty(out.shape, dtype=dtype)
        view = values.view(torch.uint8).numpy().data
        self._fill(view, begin + start * dtype.itemsize)
        if values is not out:
            out.copy_(values)

    def checksum(self, kinds: Collection[str]) -> Checksums:
        """Returns the checksums of the header and of some kinds, without the whole file's."""
        sums = {}
        for kind in kinds:
            places = [place[1:] for name, place in self.places.items() if _kind(name) == kind]
            value = 0
            for start, stop in _joined(places):
                value = self._crc(value, start, stop)
            if places:
                sums[kind] = _hex(value)
        return Checksums("", _hex(zlib.crc32(self.header)), sums)

    def _crc(self, value: int, start: int, stop: int) -> int:
        buffer = memoryview(bytearray(min(CHUNK, stop - start)))
        for first in range(start, stop, CHUNK):
            chunk = buffer[: min(CHUNK, stop - first)]
            self._fill(chunk, first)
            value = zlib.crc32(chunk, value)
        return value

    def _bytes(self, start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        self._fill(memoryview(buffer), start)
        return bytes(buffer)

    def _fill(self, view: memoryview, offset: int) -> None:
        while len(view):
            count = os.preadv(self._descriptor, [view], offset)
            if count == 0:
                raise OSError(errno.EIO, "ends early", str(self.path))
            view, offset = view[count:], offset + count


def _write_all(descriptor: int, views: list[memoryview]) -> None:
    """Writes all bytes of the views, and empties the list."""
    while views:
        written = os.writev(descriptor, views)
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if written:
            views[0] = views[0][written:]


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns spans of a file in order, with adjacent spans joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and joined[-1][1] == start:
            start, _ = joined.pop()
        joined.append((start, stop))
    return joined


def _places(table: Any, begin: int) -> dict[str, Place]:
    try:
        return {
            name: Place(DTYPES[item["dtype"]], *(begin + end for end in item["data_offsets"]))
            for name, item in table.items()
            if name != "__metadata__"
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"no table of tensors ({error})") from error


def _kind(name: str) -> str:
    return name.partition(".")[0]


def _hex(value: int) -> str:
    return f"{value:08x}"

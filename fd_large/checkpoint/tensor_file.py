"""Writes and reads files of tensors in the safetensors format, by plain system calls.

The safetensors library is not enough for checkpoints. The library's errors have only a text instead
of the errno of a failed call, and a read error in a memory-mapped file is a signal that ends the
process. Checkpoints also need reads of a few bytes from many files, and checksums of parts of a
file that are computed during the write.
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
"""Largest number of tensors that one system call writes; the system allows 1024."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Place(NamedTuple):
    """Data type and position of a tensor in a file.

    Attributes:
        dtype: Data type of the tensor.
        start: Offset of the tensor's first byte in the file.
        stop: Offset after the tensor's last byte.
    """

    dtype: torch.dtype
    start: int
    stop: int


class Checksums(NamedTuple):
    """CRC-32 checksums of a file of tensors, each as eight hexadecimal digits.

    Attributes:
        file: Checksum of the whole file.
        header: Checksum of the bytes before the first tensor.
        kinds: Checksum of the concatenated tensors of each kind, by kind. The kind of a tensor is
            the part of its name before the first dot.
    """

    file: str
    header: str
    kinds: dict[str, str]


def header_of(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, Place]]:
    """Returns the header of a file of tensors, and the position of each tensor.

    Args:
        tensors: Data type and shape of each tensor, by name.
        metadata: Further texts for the header, by name.

    Returns: the bytes before the first tensor; the position of each tensor, by name, in the order
        of the tensors in the file.
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
    """Writes tensors to a file and flushes the file to disk.

    The mode of a new file follows the user's umask.

    Args:
        path: The file, which is overwritten if it exists.
        tensors: Contiguous tensors in host memory, by name.

    Returns: the checksums of the written bytes.
    Raises: OSError: if the file cannot be written; the file is incomplete after this error.
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
    """An open file of tensors, whose file descriptor stays open until `close`.

    Args:
        path: The file.
        headers: Cache of parsed headers by their bytes, to which this file's header is added. Files
            with equal headers share a parsed header, since the headers of a thousand ranks' files
            would otherwise fill memory.

    Attributes:
        path: The file.
        header: The bytes before the first tensor.
        places: Data type and position of each tensor, by name.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if the file is not in the safetensors format.
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
        """Closes the file; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()

    def read_into(self, out: Tensor, name: str, start: int) -> None:
        """Fills a tensor with consecutive elements of a tensor in the file.

        Args:
            out: (num_elements,) float32, which is filled.
            name: Name of the tensor in the file.
            start: Index of the first element to read, in the flattened tensor.

        Raises: OSError: if the file cannot be read or ends early.
        """
        dtype, begin, _ = self.places[name]
        values = out if dtype == out.dtype else torch.empty(out.shape, dtype=dtype)
        view = values.view(torch.uint8).numpy().data
        self._fill(view, begin + start * dtype.itemsize)
        if values is not out:
            out.copy_(values)

    def checksum(self, kinds: Collection[str]) -> Checksums:
        """Returns checksums of the header and of the tensors of some kinds.

        Args:
            kinds: Kinds of tensors; a kind is the part of a tensor's name before the first dot.

        Returns: the checksums. The attribute `file` is "", and `kinds` has no entry for a kind of
            which the file has no tensor.
        """
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
    """Writes all bytes of `views` to a file, and empties the list `views`.

    Args:
        descriptor: File descriptor of the file.
        views: Views of the bytes, in order.
    """
    while views:
        written = os.writev(descriptor, views)
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if written:
            views[0] = views[0][written:]


def _joined(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Returns parts of a file in ascending order, with adjoining parts joined to one.

    Args:
        spans: The parts (start, stop), which are the bytes [start, stop) of the file.
    """
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

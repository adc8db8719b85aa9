"""Reads torch files within bounds of memory: zip and TorchScript archives, and legacy files.

Legacy files are those of torch before 1.6. TorchScript's code is never compiled; it is searched as
text for the names of parameters and buffers. torch's own reader decompresses without bound and runs
TorchScript. Tensors are views of the memory-mapped file, so that the ranks of a node share one copy
in the page cache.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fd_large.weights.unpickle import (
    NAME_LENGTH,
    Budget,
    Held,
    Module,
    RefusedError,
    unpickled,
)

_PICKLE_BYTES, _DIRECTORY_BYTES = 32 << 20, 8 << 20
_MAGIC = 0x1950A86A20F9469CFC6C


def load(path: Path) -> Any:
    """Returns the contents of the torch file `path`: containers, plain values, tensors.

    Other objects become `Passive` objects. The contents of a TorchScript archive are the module's
    state dict.

    Raises:
        RefusedError: If the pickle imports a name or makes a call that is not known here.
        Exception: If the file is damaged or exceeds a bound; the class is ValueError, LookupError,
            TypeError, OSError, zipfile.BadZipFile or another.
    """
    if not zipfile.is_zipfile(path):
        return _legacy(path)
    with _Archive(path) as archive:
        if archive.is_script:
            budget = Budget()
            root = unpickled(archive.pickle(), archive.storage, budget, script=True)
            return _state_dict(root, archive, budget)
        return unpickled(archive.pickle(), archive.storage, Budget())


class _Mapped:
    """A memory-mapped file, which stays mapped as long as a view of it exists."""

    def __init__(self, path: Path) -> None:
        self.size = path.stat().st_size
        self._bytes = torch.UntypedStorage.from_file(str(path), False, self.size)
        self._held: dict[tuple[int, torch.dtype, int], Held] = {}
        self._copied = 0

    def held(self, begin: int, dtype: torch.dtype, numel: int) -> Held:
        """Returns the storage at byte `begin`; equal arguments give the same object."""
        if (begin, dtype, numel) not in self._held:
            self._held[begin, dtype, numel] = self._new(begin, dtype, numel)
        return self._held[begin, dtype, numel]

    def _new(self, begin: int, dtype: torch.dtype, numel: int) -> Held:
        if begin + numel * dtype.itemsize > self.size:
            raise ValueError("a storage beyond the end of the file")
        piece = self._bytes[begin : begin + numel * dtype.itemsize]
        # Kernels may rely on the alignment of numbers.
        if begin % dtype.itemsize:
            self._copied += len(piece)
            if self._copied > self.size:
                raise ValueError("overlapping storages")
            piece = piece.clone()
        return Held(piece, dtype, numel)


class _Archive:
    """A torch file that is a zip archive; pickles are read within bounds, storages are mapped."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(_Bounded(path))
        self._mapped = _Mapped(path)
        self._left = _PICKLE_BYTES
        names = [name for name in self._zip.namelist() if re.fullmatch("[^/]*/data.pkl", name)]
        if len(names) != 1:
            raise ValueError(f"{len(names)} files named data.pkl in the archive")
        self._root = names[0].removesuffix("data.pkl")
        self.is_script = f"{self._root}constants.pkl" in self._zip.NameToInfo
        order = f"{self._root}byteorder"
        if order in self._zip.NameToInfo and self.read("byteorder") != b"little":
            raise ValueError("numbers in big-endian byte order")

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def pickle(self) -> BinaryIO:
        """Returns the archive's main pickle, data.pkl, as a file in memory."""
        return io.BytesIO(self.read("data.pkl"))

    def read(self, name: str) -> bytes:
        """Returns the bytes of the file `name` in the archive.

        Raises: ValueError: if the file has a compression that torch does not use, or all reads of
            this archive together exceed a bound.
        """
        info = self._zip.getinfo(self._root + name)
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError("a compression that torch does not use")
        parts = []
        with self._zip.open(info) as file:
            while part := file.read(1 << 20):
                parts.append(part)
                self._left -= len(part)
                if self._left < 0:
                    raise ValueError(f"more than {_PICKLE_BYTES >> 20} MB of pickles and code")
        return b"".join(parts)

    def storage(self, key: str, dtype: torch.dtype, numel: int) -> Held:
        """Returns the storage `key` of the archive, with `numel` elements of `dtype`.

        Raises: ValueError: if the storage is compressed or encrypted, which it never is in files of
            torch, or is shorter than `numel` elements of `dtype`.
        """
        info = self._zip.getinfo(f"{self._root}data/{key}")
        with open(self._zip.filename, "rb") as file:
            file.seek(info.header_offset)
            header = file.read(30)
        if header[:4] != b"PK\x03\x04" or info.compress_type or info.flag_bits & 1:
            raise ValueError("a storage that is compressed, encrypted or not there")
        begin = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if numel * dtype.itemsize > info.file_size:
            raise ValueError(f"a storage of {numel} elements beyond its data")
        return self._mapped.held(begin, dtype, numel)


class _Bounded(io.FileIO):
    """A file that refuses large reads, so that zipfile cannot read a huge table of contents."""

    def read(self, size: int | None = -1) -> bytes:
        """Returns the next `size` bytes; without a size, the rest of the file up to 8 MB.

        Raises: ValueError: if `size` is more than 8 MB.
        """
        if size is not None and size > _DIRECTORY_BYTES:
            raise ValueError(f"more than {_DIRECTORY_BYTES >> 20} MB of names in the archive")
        return super().read(_DIRECTORY_BYTES if size is None or size < 0 else size)


def _legacy(path: Path) -> Any:
    """Returns the contents of the legacy file `path`, which has five pickles and then the storages.

    The pickle of the contents is read twice: first to learn the dtypes and sizes of the storages,
    which give their positions in the file, then to make the tensors.
    """
    with path.open("rb") as file:
        head = io.BytesIO(file.read(_PICKLE_BYTES))
    budget = Budget()
    if unpickled(head, _nowhere, budget) != _MAGIC:
        raise ValueError("not a torch file")
    mapped, places = _Mapped(path), {}
    unpickled(head, _nowhere, budget)  # The second pickle is the version of the protocol.
    if not unpickled(head, _nowhere, budget).get("little_endian", True):
        raise ValueError("numbers in big-endian byte order")
    begin, storages = head.tell(), {}

    def noted(key: str, dtype: torch.dtype, numel: int) -> Held:
        storages[key] = Held(None, dtype, numel)
        return storages[key]

    unpickled(head, noted, budget)
    keys = unpickled(head, _nowhere, budget)
    at = head.tell()
    for key in keys:
        if not isinstance(key, str):
            raise ValueError("a storage without a name")
        at += 8  # The number of elements is repeated before the values.
        places[key] = at
        at += storages[key].numel * storages[key].dtype.itemsize
    head.seek(begin)

    def placed(key: str, dtype: torch.dtype, numel: int) -> Held:
        return mapped.held(places[key], dtype, numel)

    return unpickled(head, placed, budget)


def _nowhere(key: str, dtype: torch.dtype, numel: int) -> Held:
    raise ValueError("a storage before the contents")


def _state_dict(root: Any, archive: _Archive, budget: Budget) -> dict[str, Tensor]:
    """Returns {name: tensor} of the parameters and buffers of an unpickled TorchScript module.

    The archive's code lists the parameters and buffers of each class. The budget bounds the number
    of modules and attributes.
    """
    state: dict[str, Tensor] = {}
    listed: dict[str, Mapping[str, frozenset[str]]] = {}
    pending = [("", root)]
    while pending:
        prefix, module = pending.pop()
        if len(prefix) > NAME_LENGTH or not isinstance(module, Module):
            raise ValueError("an archive without a module, or with modules nested too deeply")
        file, _, name = module.name.rpartition(".")
        if file not in listed:
            listed[file] = _named_tensors(archive.read(f"code/{file.replace('.', '/')}.py"))
        named = listed[file].get(name, frozenset())
        inside = []
        budget.take(1 + len(module.attributes))
        for key, value in module.attributes.items():
            if torch.is_tensor(value) and key in named:
                state[f"{prefix}{key}"] = value
            elif isinstance(value, Module):
                inside.append((f"{prefix}{key}.", value))
        pending += reversed(inside)
    return state


_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n((?:  __(?:parameters|buffers)__ = \[.*\]\n)*)", re.M
)


def _named_tensors(code: bytes) -> dict[str, frozenset[str]]:
    """Returns {class name: names of its parameters and buffers} from a source file of TorchScript.

    Raises: RefusedError: if a class has code that restores its objects (`__setstate__`).
    """
    if b"def __setstate__" in code:
        raise RefusedError("__setstate__ of a TorchScript module")
    return {
        match[1]: frozenset(re.findall(r'"([^"]*)"', match[2]))
        for match in _CLASS.finditer(code.decode())
    }

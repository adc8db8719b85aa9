"""Reads torch files as data: zip archives, TorchScript archives, and files of before torch 1.6.

A pickle is a program for a stack machine. The one below knows tensors, containers and plain values;
it imports nothing, calls nothing of the file or of a package, and takes settings that published
files carry beside their tensors as passive objects. TorchScript's code is never compiled: it is
searched as text for the names of parameters and buffers. torch's own restricted reader is not
enough: it hashes whatever a file asks for, inflates without bound and runs TorchScript.

Every step has a bound. Tensors are views of the mapped file, so that the ranks of a host share one
copy in its page cache.
"""

from __future__ import annotations

import io
import math
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

NAME_LENGTH = 500
"""Characters of the longest name of a tensor, and of any other key."""
# 10,000 tensors are 350,000 operations.
_PICKLE_BYTES, _OPERATIONS = 32 << 20, 500_000
_DIRECTORY_BYTES, _ENTRIES = 8 << 20, 100_000
# torch's kernels take no more dimensions.
_LARGEST, _DIMENSIONS = 2**63 - 1, 64
_MAGIC = 0x1950A86A20F9469CFC6C


class RefusedError(ValueError):
    """A file asks for something that only running code could restore; its text is the name."""


class Passive:
    """An object that nothing is known of but that it was there."""

    __slots__ = ()

    def __str__(self) -> str:
        return "an object of another kind"


# No tuples, which a pickle can make itself.
@dataclass(frozen=True, slots=True)
class _Global:
    """A name that a pickle would import."""

    name: str


class _Module:
    """A module of a TorchScript archive: the name of its class, and its attributes."""

    def __init__(self, name: str) -> None:
        self.name, self.attributes = name, {}


@dataclass(frozen=True, slots=True)
class _Held:
    """The bytes of a storage, mapped, and the type that they are of; None while places are sought.

    `numel` counts elements of `dtype`.
    """

    bytes: Any
    dtype: torch.dtype
    numel: int


class _Budget:
    """Work that few bytes of a file may ask for: entries that are copied, or met again."""

    def __init__(self) -> None:
        self._left = _ENTRIES

    def take(self, entries: int) -> None:
        """Counts entries of a dictionary or of a module, before they are gone through."""
        self._left -= entries
        if self._left < 0:
            raise ValueError(f"more than {_ENTRIES:,} entries: copies or modules without end")


# (key, type, number of elements) -> the storage.
_Storages = Callable[[str, torch.dtype, int], _Held]

_DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in (
        *("float64", "float32", "float16", "bfloat16", "complex64", "complex128"),
        *("int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64", "bool"),
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz"),
    )
}
_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64,
        "Float": torch.float32,
        "Half": torch.float16,
        "BFloat16": torch.bfloat16,
        "ComplexFloat": torch.complex64,
        "ComplexDouble": torch.complex128,
        "Long": torch.int64,
        "Int": torch.int32,
        "Short": torch.int16,
        "Char": torch.int8,
        "Byte": torch.uint8,
        "Bool": torch.bool,
        "Untyped": torch.uint8,
    }.items()
} | {"torch.storage.UntypedStorage": torch.uint8}
_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_TYPED_TENSOR = "torch._utils._rebuild_tensor_v3"
_OF_TYPE = "torch._tensor._rebuild_from_type_v2"
# Calls that return their first argument.
_FIRST = (
    "torch._utils._rebuild_parameter",
    "torch._utils._rebuild_parameter_with_state",
    *(
        f"torch.jit._pickle.{name}"
        for name in (
            "build_intlist",
            "build_tensorlist",
            "build_doublelist",
            "build_boollist",
            "restore_type_tag",
        )
    ),
)
# Dictionaries, also those with methods: their items are what they hold.
_DICTIONARIES = (
    "collections.OrderedDict",
    "collections.defaultdict",
    "collections.Counter",
    "yacs.config.CfgNode",
    "fvcore.common.config.CfgNode",
    "addict.addict.Dict",
)
_PATHS = ("Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")
_ARRAYS = ("scalar", "_reconstruct")
_PASSIVE = (
    "argparse.Namespace",
    "_codecs.encode",
    "numpy.dtype",
    "numpy.ndarray",
    *(f"{numpy}.multiarray.{n}" for numpy in ("numpy.core", "numpy._core") for n in _ARRAYS),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *(
        f"{module}.{name}"
        for module in ("builtins", "__builtin__")
        for name in (
            *("set", "frozenset", "complex", "bytearray", "slice", "range", "list", "dict"),
            *("tuple", "int", "long", "float", "bool", "str", "bytes"),
        )
    ),
    *(f"torch.{name}" for name in ("Size", "device", "Generator", "Tensor")),
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    # Tensors without values of their own: sparse, quantised, of the meta device.
    "torch._utils._rebuild_sparse_tensor",
    "torch._utils._rebuild_qtensor",
    "torch._utils._rebuild_nested_tensor",
    "torch._utils._rebuild_meta_tensor_no_storage",
    "torch._utils._rebuild_wrapper_subclass",
    "torch._tensor._rebuild_from_type",
)
_KNOWN = frozenset(
    (*_DTYPES, *_STORAGES, *_TENSORS, _TYPED_TENSOR, _OF_TYPE, *_FIRST, *_DICTIONARIES, *_PASSIVE)
)
_VALUES = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    )
)
_EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": Passive,
}
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def load(path: Path) -> Any:
    """Returns what a torch file holds: containers, plain values, tensors and passive objects.

    A TorchScript archive gives its state dict.

    Raises: RefusedError: if it asks for anything that is not known here; another exception
        (ValueError, LookupError, TypeError, OSError, zipfile.BadZipFile and what else a damaged
        file leads to) if it is damaged, or larger than a bound.
    """
    if not zipfile.is_zipfile(path):
        return _legacy(path)
    with _Archive(path) as archive:
        if archive.is_script:
            budget = _Budget()
            root = _unpickled(archive.pickle(), archive.storage, budget, script=True)
            return _state_dict(root, archive, budget)
        return _unpickled(archive.pickle(), archive.storage, _Budget())


# --- the machine ---


def _unpickled(
    pickle: BinaryIO, storages: _Storages, budget: _Budget, *, script: bool = False
) -> Any:
    """Carries out the next pickle of a file."""
    stack: list[Any] = []
    marked: list[list[Any]] = []
    memo: dict[int, Any] = {}
    for count, (operation, argument, _) in enumerate(pickletools.genops(pickle)):
        if count > _OPERATIONS:
            raise ValueError(f"a pickle of more than {_OPERATIONS:,} operations")
        name = operation.name
        if name in _VALUES:
            stack.append(argument)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            marked.append(stack)
            stack = []
        elif name == "TUPLE":
            stack, items = marked.pop(), stack
            stack.append(tuple(items))
        elif name in _SHORT_TUPLES:
            number = _SHORT_TUPLES[name]
            if len(stack) < number:
                raise ValueError("a pickle that takes from an empty stack")
            stack[-number:] = [tuple(stack[-number:])]
        elif name == "GLOBAL":
            stack.append(_known(argument.replace(" ", ".", 1), script))
        elif name == "STACK_GLOBAL":
            last, module = stack.pop(), stack.pop()
            # Written out, a tuple that holds another twice doubles with every level.
            if not isinstance(module, str) or not isinstance(last, str):
                raise ValueError("a name that is no text")
            stack.append(_known(f"{module}.{last}", script))
        elif name == "BINPERSID":
            stack.append(_storage(stack.pop(), storages))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_called(stack.pop(), arguments, budget))
        elif name in ("NEWOBJ", "NEWOBJ_EX"):
            del stack[-1 if name == "NEWOBJ" else -2 :]
            stack.append(_made(stack.pop()))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Module):
                if not isinstance(state, dict):
                    raise RefusedError(f"{stack[-1].name}.__setstate__"[:200])
                stack[-1].attributes = state
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            if name == "SETITEM":
                items = stack[-2:]
                del stack[-2:]
            else:
                stack, items = marked.pop(), stack
            if name == "DICT":
                stack.append({})
            _set_items(stack[-1], items)
        elif name in ("APPEND", "APPENDS", "LIST"):
            if name == "APPEND":
                items = [stack.pop()]
            else:
                stack, items = marked.pop(), stack
            if name == "LIST":
                stack.append([])
            if not isinstance(stack[-1], list):
                raise ValueError("a pickle that appends to something else than a list")
            stack[-1].extend(items)
        elif name in ("ADDITEMS", "FROZENSET"):
            stack = marked.pop()
            if name == "FROZENSET":
                stack.append(Passive())
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            stack = marked.pop()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "STOP":
            return stack.pop()
        elif name in ("INST", "OBJ"):
            raise RefusedError(str(argument or name)[:200])
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the pickle operation {name}")
    raise ValueError("a pickle without an end")


def _known(name: str, script: bool) -> _Global:
    own = script and name.startswith("__torch__.") and len(name) <= NAME_LENGTH
    if own or name in _KNOWN:
        return _Global(name)
    raise RefusedError(name[:200])


def _made(of: Any) -> Any:
    if not isinstance(of, _Global):
        raise RefusedError("an object of no named class")
    if of.name.startswith("__torch__."):
        return _Module(of.name)
    return {} if of.name in _DICTIONARIES else Passive()


def _called(function: Any, arguments: Any, budget: _Budget) -> Any:
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise RefusedError("a call of what has no name")
    if function.name in _TENSORS:
        metadata = arguments[6:7] if function.name.endswith("_v2") else ()
        return Passive() if any(metadata) else _tensor(*arguments[:4])
    if function.name == _TYPED_TENSOR:
        dtype = _DTYPES[arguments[6].name]
        return Passive() if any(arguments[7:8]) else _tensor(*arguments[:4], dtype=dtype)
    if function.name == _OF_TYPE:
        inner, of, given = arguments[:3]
        plain = of in (_Global("torch.Tensor"), _Global("torch.nn.parameter.Parameter"))
        # What it calls is no call of this kind again, which could go on without end.
        return _called(inner, given, budget) if plain and inner != function else Passive()
    if function.name in _FIRST:
        return arguments[0]
    if function.name in _DICTIONARIES:
        found: dict[Any, Any] = {}
        items = arguments[0] if arguments else ()
        if isinstance(items, dict | list | tuple):
            budget.take(len(items))
        if isinstance(items, dict):
            found.update(items)
        elif isinstance(items, list | tuple):
            for key, value in items:
                _set_items(found, [key, value])
        return found
    return Passive()


def _set_items(into: Any, items: list[Any]) -> None:
    if not isinstance(into, dict) or len(items) % 2:
        raise ValueError("a pickle that sets items of something else than a dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        into[key if _is_key(key) else Passive()] = value


def _is_key(key: Any) -> bool:
    """Whether a key is hashed and compared in no time.

    Tuples in tuples, chosen large numbers and long texts are not.
    """
    if type(key) is int:
        return -(2**31) < key < 2**31
    if type(key) in (str, bytes):
        return len(key) <= NAME_LENGTH
    return key is None or type(key) in (float, bool)


# --- tensors ---


def _storage(identity: Any, storages: _Storages) -> _Held:
    if not isinstance(identity, tuple) or len(identity) > 6:
        raise ValueError("a storage of an unknown kind")
    kind, of, key, _, number, *view = identity
    if kind != "storage" or any(view) or not isinstance(of, _Global) or of.name not in _STORAGES:
        raise ValueError("a storage of an unknown kind")
    if not isinstance(key, str) or not _is_size(number):
        raise ValueError("a storage without a name or size")
    return storages(key, _STORAGES[of.name], number)


def _tensor(
    held: Any, offset: Any, size: Any, stride: Any, *, dtype: torch.dtype | None = None
) -> Tensor | Passive:
    """A view of a storage that lies in it, and has no more elements than it."""
    if not isinstance(held, _Held) or len(size) != len(stride) or len(size) > _DIMENSIONS:
        raise ValueError("a tensor without a storage, size or stride")
    if not all(map(_is_size, (offset, *size, *stride))):
        raise ValueError("a tensor without a storage, size or stride")
    dtype = dtype or held.dtype
    numel = held.numel * held.dtype.itemsize // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= numel or math.prod(size) > numel):
        raise ValueError(f"a tensor of size {tuple(size)} beyond its storage of {numel}")
    if held.bytes is None:
        return Passive()
    return torch.empty(0, dtype=dtype).set_(held.bytes, offset, tuple(size), tuple(stride))


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number <= _LARGEST


class _Mapped:
    """A file in memory, as far as it is touched; stays while a view of it does."""

    def __init__(self, path: Path) -> None:
        self.size = path.stat().st_size
        self._bytes = torch.UntypedStorage.from_file(str(path), False, self.size)
        self._held: dict[tuple[int, torch.dtype, int], _Held] = {}
        self._copied = 0

    def held(self, begin: int, dtype: torch.dtype, numel: int) -> _Held:
        """Returns a storage, the same one whenever it is asked for."""
        if (begin, dtype, numel) not in self._held:
            self._held[begin, dtype, numel] = self._new(begin, dtype, numel)
        return self._held[begin, dtype, numel]

    def _new(self, begin: int, dtype: torch.dtype, numel: int) -> _Held:
        if begin + numel * dtype.itemsize > self.size:
            raise ValueError("a storage beyond the end of the file")
        piece = self._bytes[begin : begin + numel * dtype.itemsize]
        # Kernels may rely on it that numbers do not straddle.
        if begin % dtype.itemsize:
            self._copied += len(piece)
            if self._copied > self.size:
                raise ValueError("storages that lie in each other")
            piece = piece.clone()
        return _Held(piece, dtype, numel)


# --- kinds of file ---


class _Archive:
    """A zip archive: its pickles, read within bounds, and its storages, mapped."""

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
            raise ValueError("numbers of another byte order")

    def __enter__(self) -> _Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()

    def pickle(self) -> BinaryIO:
        """Returns the pickle of the contents."""
        return io.BytesIO(self.read("data.pkl"))

    def read(self, name: str) -> bytes:
        """Returns a file of the archive; all that are read have a bound together."""
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

    def storage(self, key: str, dtype: torch.dtype, numel: int) -> _Held:
        """Returns a storage, which torch does not compress."""
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
    """A file of which zipfile cannot read a table of contents of any size."""

    def read(self, size: int | None = -1) -> bytes:
        """Reads at most a few megabytes."""
        if size is not None and size > _DIRECTORY_BYTES:
            raise ValueError(f"more than {_DIRECTORY_BYTES >> 20} MB of names in the archive")
        return super().read(_DIRECTORY_BYTES if size is None or size < 0 else size)


def _legacy(path: Path) -> Any:
    """Five pickles, then the storages; a storage's place shows when its type is known."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(_PICKLE_BYTES))
    budget = _Budget()
    if _unpickled(head, _nowhere, budget) != _MAGIC:
        raise ValueError("no torch file")
    mapped, places = _Mapped(path), {}
    _unpickled(head, _nowhere, budget)  # The version of the protocol.
    if not _unpickled(head, _nowhere, budget).get("little_endian", True):
        raise ValueError("numbers of another byte order")
    begin, found = head.tell(), {}

    def noted(key: str, dtype: torch.dtype, numel: int) -> _Held:
        found[key] = _Held(None, dtype, numel)
        return found[key]

    _unpickled(head, noted, budget)
    keys = _unpickled(head, _nowhere, budget)
    at = head.tell()
    for key in keys:
        if not isinstance(key, str):
            raise ValueError("a storage without a name")
        at += 8  # Its number of elements again.
        places[key] = at
        at += found[key].numel * found[key].dtype.itemsize
    head.seek(begin)

    def placed(key: str, dtype: torch.dtype, numel: int) -> _Held:
        return mapped.held(places[key], dtype, numel)

    return _unpickled(head, placed, budget)


def _nowhere(key: str, dtype: torch.dtype, numel: int) -> _Held:
    raise ValueError("a storage before the contents")


def _state_dict(root: Any, archive: _Archive, budget: _Budget) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript module, by name."""
    state: dict[str, Tensor] = {}
    listed: dict[str, Mapping[str, frozenset[str]]] = {}
    pending = [("", root)]
    while pending:
        prefix, module = pending.pop()
        if len(prefix) > NAME_LENGTH or not isinstance(module, _Module):
            raise ValueError("an archive of no module, or of modules without end")
        file, _, name = module.name.rpartition(".")
        if file not in listed:
            listed[file] = _named_tensors(archive.read(f"code/{file.replace('.', '/')}.py"))
        named = listed[file].get(name, frozenset())
        inside = []
        budget.take(1 + len(module.attributes))
        for key, value in module.attributes.items():
            if torch.is_tensor(value) and key in named:
                state[f"{prefix}{key}"] = value
            elif isinstance(value, _Module):
                inside.append((f"{prefix}{key}.", value))
        pending += reversed(inside)
    return state


_CLASS = re.compile(
    r"^class (\w+)\(Module\):\n((?:  __(?:parameters|buffers)__ = \[.*\]\n)*)", re.M
)


def _named_tensors(code: bytes) -> dict[str, frozenset[str]]:
    """The parameters and buffers that each class of a file of TorchScript lists.

    Raises: RefusedError: if one restores itself by code.
    """
    if b"def __setstate__" in code:
        raise RefusedError("__setstate__ of a TorchScript module")
    return {
        match[1]: frozenset(re.findall(r'"([^"]*)"', match[2]))
        for match in _CLASS.finditer(code.decode())
    }

"""Reads the pickles of torch files as data.

A pickle is a program for a stack machine. This reader is the standard library's machine without
operations that import, call or hash arbitrary objects. It makes tensors, containers and plain
values; other objects in published files, such as settings, become empty `Passive` objects. All
operations are checked before the first is run, and every step has a bound. torch's own restricted
reader is not enough, because it hashes arbitrary objects.
"""

from __future__ import annotations

import math
import pickle
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

NAME_LENGTH = 500
"""Largest number of characters in the name of a tensor, and in any other key of a dict."""
# 10,000 tensors are 350,000 operations.
_OPERATIONS, _ENTRIES = 500_000, 100_000
# torch's kernels do not take more dimensions than these.
_LARGEST, _DIMENSIONS = 2**63 - 1, 64


class RefusedError(ValueError):
    """Raised if a file contains an object that only running code could restore.

    The message is the object's name.
    """


class Passive:
    """Stands for an object that is not restored; it has no contents."""

    __slots__ = ()

    def __str__(self) -> str:
        return "an object of another kind"


# These classes are not tuples, since a pickle can make a tuple itself.
@dataclass(frozen=True, slots=True)
class _Global:
    """A name that a pickle asks to import; it is never imported."""

    name: str


class Module:
    """A module of a TorchScript archive, as the name of its class and {attribute: value}."""

    def __init__(self, name: str) -> None:
        self.name, self.attributes = name, {}


@dataclass(frozen=True, slots=True)
class Held:
    """A storage in a torch file.

    Attributes:
        bytes: The mapped bytes; None until the position of the storage in the file is known.
        dtype: Data type of the elements.
        numel: Number of elements.
    """

    bytes: Any
    dtype: torch.dtype
    numel: int


class Budget:
    """A bound on the number of entries of dicts and modules that a file makes this reader process.

    A few bytes of a pickle can copy or repeat many entries.
    """

    def __init__(self) -> None:
        self._left = _ENTRIES

    def take(self, entries: int) -> None:
        """Counts `entries` more entries of dicts or modules, before they are processed.

        Raises: ValueError: if all entries counted so far exceed the bound.
        """
        self._left -= entries
        if self._left < 0:
            raise ValueError(f"more than {_ENTRIES:,} entries: endless copies or modules")


# (key, type, number of elements) -> the storage.
Storages = Callable[[str, torch.dtype, int], Held]

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
        **{"Double": torch.float64, "Float": torch.float32, "Half": torch.float16},
        **{"BFloat16": torch.bfloat16, "ComplexFloat": torch.complex64},
        **{"ComplexDouble": torch.complex128, "Long": torch.int64, "Int": torch.int32},
        **{"Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8, "Bool": torch.bool},
        **{"Untyped": torch.uint8, "storage.Untyped": torch.uint8},
    }.items()
}
_TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_TYPED_TENSOR = "torch._utils._rebuild_tensor_v3"
_OF_TYPE = "torch._tensor._rebuild_from_type_v2"
# Calls that return their first argument.
_FIRST = re.compile(
    r"torch\._utils\._rebuild_parameter(_with_state)?"
    r"|torch\.jit\._pickle\.(build_(int|tensor|double|bool)list|restore_type_tag)"
)
# Dictionaries, also those with methods: their items are what they hold.
_DICTIONARIES = re.compile(
    r"collections\.(OrderedDict|defaultdict|Counter)"
    r"|(yacs|fvcore\.common)\.config\.CfgNode|addict\.addict\.Dict"
)
_PASSIVE = re.compile(
    r"argparse\.Namespace|_codecs\.encode|numpy\.(dtype|ndarray)"
    r"|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)"
    r"|pathlib(\._local)?\.(Path|(Pure)?(Posix|Windows)Path)"
    r"|(builtins|__builtin__)\.(set|frozenset|complex|bytearray|slice|range|list|dict|tuple|int"
    r"|long|float|bool|str|bytes)"
    r"|torch\.(Size|device|Generator|Tensor|nn\.parameter\.Parameter|serialization\._get_layout)"
    # Tensors without values of their own: sparse, quantised, of the meta device.
    r"|torch\._utils\._rebuild_(sparse_tensor|qtensor|nested_tensor|meta_tensor_no_storage"
    r"|wrapper_subclass)|torch\._tensor\._rebuild_from_type"
)
# Names, and patterns of names, that a pickle may contain; none of them is imported.
_NAMES = frozenset((*_DTYPES, *_STORAGES, *_TENSORS, _TYPED_TENSOR, _OF_TYPE))
_PATTERNS = (_FIRST, _DICTIONARIES, _PASSIVE)
# Operations that make an object by calling its class.
_CALLS = ("INST", "OBJ")
# Operations that read registries of this process, or memory outside the file; torch writes none.
_REFUSED = ("EXT1", "EXT2", "EXT4", "PERSID", "NEXT_BUFFER", "READONLY_BUFFER")
_PROTOCOL = 5


def unpickled(file: BinaryIO, storages: Storages, budget: Budget, *, script: bool = False) -> Any:
    """Reads the next pickle of a file and returns its object.

    Args:
        file: A file in memory, positioned at the start of the pickle; afterwards at its end.
        storages: Returns a storage, given its key, dtype and number of elements.
        budget: Bound on entries, shared by all pickles of the torch file.
        script: Whether objects of TorchScript's classes become a `Module`; else they are refused.

    Raises:
        RefusedError: If the pickle imports a name or makes a call that is not known here.
        Exception: If the pickle is damaged or exceeds a bound; the class is any.
    """
    begin = file.tell()
    # This finds lengths that go beyond the file, for which the machine would make room.
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if count > _OPERATIONS:
            raise ValueError(f"a pickle of more than {_OPERATIONS:,} operations")
        if operation.name in _CALLS:
            raise RefusedError(str(argument or operation.name)[:200])
        if operation.name in _REFUSED or operation.proto > _PROTOCOL:
            raise ValueError(f"the pickle operation {operation.name}")
    file.seek(begin)
    try:
        return _Reader(file, storages, budget, script).load()
    except pickle.UnpicklingError as error:
        raise ValueError(str(error)) from error


class _Reader(pickle._Unpickler):
    """The standard library's unpickler in Python, with its unsafe operations replaced.

    The unpickler in C is not used, since it allocates memory for any memo index in a pickle.
    """

    def __init__(self, file: BinaryIO, storages: Storages, budget: Budget, script: bool) -> None:
        super().__init__(file, encoding="latin1")
        self._storages, self._budget, self._script = storages, budget, script

    def find_class(self, module: str, name: str) -> _Global:
        """Returns a `_Global` for a known name, and raises RefusedError for others; no imports."""
        name = f"{module}.{name}"
        scripted = self._script and name.startswith("__torch__.") and len(name) <= NAME_LENGTH
        if scripted or name in _NAMES or any(known.fullmatch(name) for known in _PATTERNS):
            return _Global(name)
        raise RefusedError(name[:200])

    def persistent_load(self, identity: Any) -> Held:
        """Returns the storage that `identity`, a persistent id of the pickle, describes."""
        return _storage(identity, self._storages)

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], arguments, self._budget)

    def _new(self) -> None:
        del self.stack[-1]
        self.stack[-1] = _made(self.stack[-1])

    def _new_by_names(self) -> None:
        del self.stack[-1]
        self._new()

    def _build(self) -> None:
        state, built = self.stack.pop(), self.stack[-1]
        if isinstance(built, Module):
            if not isinstance(state, dict):
                raise RefusedError(f"{built.name}.__setstate__"[:200])
            built.attributes = state

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _set_items(self.stack[-1], [key, value])

    def _set_items(self) -> None:
        items = self.pop_mark()
        _set_items(self.stack[-1], items)

    def _dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        _set_items(self.stack[-1], items)

    def _empty_set(self) -> None:
        self.stack.append(Passive())

    def _frozen_set(self) -> None:
        self.pop_mark()
        self._empty_set()

    dispatch = pickle._Unpickler.dispatch | {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _new,
        pickle.NEWOBJ_EX[0]: _new_by_names,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _dict,
        pickle.EMPTY_SET[0]: _empty_set,
        pickle.ADDITEMS[0]: lambda reader: reader.pop_mark(),
        pickle.FROZENSET[0]: _frozen_set,
    }


def _made(of: Any) -> Any:
    if not isinstance(of, _Global):
        raise RefusedError("an object of no named class")
    if of.name.startswith("__torch__."):
        return Module(of.name)
    return {} if _DICTIONARIES.fullmatch(of.name) else Passive()


def _called(function: Any, arguments: Any, budget: Budget) -> Any:
    if not isinstance(function, _Global) or not isinstance(arguments, tuple):
        raise RefusedError("a call of an unnamed object")
    if function.name in _TENSORS:
        metadata = arguments[6:7] if function.name.endswith("_v2") else ()
        return Passive() if any(metadata) else _tensor(*arguments[:4])
    if function.name == _TYPED_TENSOR:
        dtype = _DTYPES[arguments[6].name]
        return Passive() if any(arguments[7:8]) else _tensor(*arguments[:4], dtype=dtype)
    if function.name == _OF_TYPE:
        inner, of, call_arguments = arguments[:3]
        plain = of in (_Global("torch.Tensor"), _Global("torch.nn.parameter.Parameter"))
        # Nested calls of this kind are not followed, since they could go on without end.
        return _called(inner, call_arguments, budget) if plain and inner != function else Passive()
    if _FIRST.fullmatch(function.name):
        return arguments[0]
    if _DICTIONARIES.fullmatch(function.name):
        dictionary: dict[Any, Any] = {}
        items = arguments[0] if arguments else ()
        if isinstance(items, dict | list | tuple):
            budget.take(len(items))
        if isinstance(items, dict):
            dictionary.update(items)
        elif isinstance(items, list | tuple):
            for key, value in items:
                _set_items(dictionary, [key, value])
        return dictionary
    return Passive()


def _set_items(into: Any, items: list[Any]) -> None:
    if not isinstance(into, dict) or len(items) % 2:
        raise ValueError("a pickle that sets items of an object that is not a dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        into[key if _is_key(key) else Passive()] = value


def _is_key(key: Any) -> bool:
    """Whether `key`, a key of a dict, can be hashed and compared in bounded time.

    False for tuples, large integers and long texts, by which a file could make lookups slow.
    """
    if type(key) is int:
        return -(2**31) < key < 2**31
    if type(key) in (str, bytes):
        return len(key) <= NAME_LENGTH
    return key is None or type(key) in (float, bool)


def _storage(identity: Any, storages: Storages) -> Held:
    if not isinstance(identity, tuple) or len(identity) > 6:
        raise ValueError("a storage of an unknown kind")
    kind, of, key, _, number, *view = identity
    if kind != "storage" or any(view) or not isinstance(of, _Global) or of.name not in _STORAGES:
        raise ValueError("a storage of an unknown kind")
    if not isinstance(key, str) or not _is_size(number):
        raise ValueError("a storage without a name or size")
    return storages(key, _STORAGES[of.name], number)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, *, dtype: torch.dtype | None = None
) -> Tensor | Passive:
    """Returns a tensor that is a view of a storage; offset and stride are in elements.

    Returns a `Passive` object if the position of the storage in the file is not known yet. Without
    a dtype, that of the storage is taken.

    Raises: ValueError: if the tensor goes beyond the end of the storage, or has more elements.
    """
    if not isinstance(storage, Held) or len(size) != len(stride) or len(size) > _DIMENSIONS:
        raise ValueError("a tensor without a storage, size or stride")
    if not all(map(_is_size, (offset, *size, *stride))):
        raise ValueError("a tensor without a storage, size or stride")
    dtype = dtype or storage.dtype
    numel = storage.numel * storage.dtype.itemsize // dtype.itemsize
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 not in size and (last >= numel or math.prod(size) > numel):
        raise ValueError(f"a tensor of size {tuple(size)} beyond its storage of {numel}")
    if storage.bytes is None:
        return Passive()
    return torch.empty(0, dtype=dtype).set_(storage.bytes, offset, tuple(size), tuple(stride))


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number <= _LARGEST

"""Reads the pickles of torch files as data.

A pickle is a program for a stack machine. The one here knows tensors, containers and plain values;
it imports nothing, calls nothing of the file or of a package, and takes settings that published
files carry beside their tensors as passive objects. torch's own restricted reader is not enough: it
hashes whatever a file asks for. Every step has a bound.
"""

from __future__ import annotations

import math
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

NAME_LENGTH = 500
"""Characters of the longest name of a tensor, and of any other key."""
# 10,000 tensors are 350,000 operations.
_OPERATIONS, _ENTRIES = 500_000, 100_000
# torch's kernels take no more dimensions.
_LARGEST, _DIMENSIONS = 2**63 - 1, 64


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


class Module:
    """A module of a TorchScript archive: the name of its class, and its attributes."""

    def __init__(self, name: str) -> None:
        self.name, self.attributes = name, {}


@dataclass(frozen=True, slots=True)
class Held:
    """The bytes of a storage, mapped, and the type that they are of; None while places are sought.

    `numel` counts elements of `dtype`.
    """

    bytes: Any
    dtype: torch.dtype
    numel: int


class Budget:
    """Work that few bytes of a file may ask for: entries that are copied, or met again."""

    def __init__(self) -> None:
        self._left = _ENTRIES

    def take(self, entries: int) -> None:
        """Counts entries of a dictionary or of a module, before they are gone through."""
        self._left -= entries
        if self._left < 0:
            raise ValueError(f"more than {_ENTRIES:,} entries: copies or modules without end")


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
_NAMES = frozenset((*_DTYPES, *_STORAGES, *_TENSORS, _TYPED_TENSOR, _OF_TYPE))
_PATTERNS = (_FIRST, _DICTIONARIES, _PASSIVE)
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


def unpickled(pickle: BinaryIO, storages: Storages, budget: Budget, *, script: bool = False) -> Any:
    """Carries out the next pickle of a file.

    Args:
        pickle: The file, at the pickle; it is read up to its end.
        storages: Returns the storage of a key, a type and a number of elements.
        budget: What the pickles of the file may ask for together.
        script: Whether classes of TorchScript become `Module`.

    Raises: RefusedError: if it asks for anything that is not known here; another exception if it is
        damaged or larger than a bound.
    """
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
            if isinstance(stack[-1], Module):
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
    if own or name in _NAMES or any(known.fullmatch(name) for known in _PATTERNS):
        return _Global(name)
    raise RefusedError(name[:200])


def _made(of: Any) -> Any:
    if not isinstance(of, _Global):
        raise RefusedError("an object of no named class")
    if of.name.startswith("__torch__."):
        return Module(of.name)
    return {} if _DICTIONARIES.fullmatch(of.name) else Passive()


def _called(function: Any, arguments: Any, budget: Budget) -> Any:
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
    if _FIRST.fullmatch(function.name):
        return arguments[0]
    if _DICTIONARIES.fullmatch(function.name):
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
    held: Any, offset: Any, size: Any, stride: Any, *, dtype: torch.dtype | None = None
) -> Tensor | Passive:
    """A view of a storage that lies in it, and has no more elements than it."""
    if not isinstance(held, Held) or len(size) != len(stride) or len(size) > _DIMENSIONS:
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

"""Compiles Triton kernels for GPUs that are not there, exactly as an operation launches them.

    rows = usage(lambda: forward(*tensors_on_meta))     # forward launches kernels
    rows[0] == {"kernel": ..., "capability": 90, "registers": 32, "shared_bytes": ..., ...}

Not in a process with TRITON_INTERPRET=1: there `@triton.jit` makes no compilable function.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fd_large.kernels.operation import function_of, recording

CAPABILITIES = (80, 90)
_BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
# Triton's launcher takes these for itself; they are no arguments of the kernel.
_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")


class Compilable(NamedTuple):
    """One launch of a kernel, by arguments' names."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


def _launched(call: Callable[[], Any]) -> list[Compilable]:
    """What `call` launches; nothing runs."""
    with recording() as launches:
        call()
    found = []
    for launch in launches:
        kernel, named = function_of(launch.kernel), dict(launch.constants)
        options = {name: named.pop(name) for name in _OPTIONS if name in named}
        arguments = dict(zip(kernel.arg_names, launch.arguments, strict=False)) | named
        found.append(Compilable(kernel, arguments, options))
    return found


def usage(
    call: Callable[[], Any], capabilities: tuple[int, ...] = CAPABILITIES
) -> list[dict[str, Any]]:
    """Returns what each kernel that `call` launches takes, once per GPU generation.

    Args:
        call: Launches kernels, on tensors of any device; meta will do, since nothing runs.
        capabilities: 80 for A100, 90 for H100.

    Returns: rows with kernel, capability, constants, dtypes (of tensors, by argument), num_warps,
        num_stages, registers (a thread), shared_bytes (a program) and spill_bytes (of a thread's
        stack and local memory).
    """
    launches = _launched(call)
    if not launches:
        raise AssertionError("nothing was launched")
    return [compiled(launch, capability) for launch in launches for capability in capabilities]


def digest(call: Callable[[], Any]) -> str:
    """Hash of all that decides what `usage` returns: the kernels' code, arguments and Triton.

    Comments, docstrings and the place of a line do not count.
    """
    launches = _launched(call)
    found = hashlib.sha256(triton.__version__.encode())
    for kernel, arguments, options in launches:
        shown = {
            name: str(value.dtype) if isinstance(value, torch.Tensor) else repr(value)
            for name, value in arguments.items()
        }
        found.update(repr((kernel.__name__, shown, options)).encode())
    for module in sorted(_with_imports({launch.kernel.fn.__module__ for launch in launches})):
        found.update(_code(module).encode())
    return found.hexdigest()[:16]


def _with_imports(modules: set[str]) -> set[str]:
    """Adds the kernels' modules that these import, and so on."""
    found: set[str] = set()
    while new := modules - found:
        found |= new
        modules = {imported for module in new for imported in _imports(module)}
    return found


@cache
def _imports(module: str) -> set[str]:
    nodes = ast.walk(ast.parse(_code(module)))
    named = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name for name in named if name.endswith("_triton")}


@cache
def _code(module: str) -> str:
    """A module's statements as Python writes them itself, without docstrings."""
    tree = ast.parse(Path(str(importlib.import_module(module).__file__)).read_text())
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def compiled(launch: Compilable, capability: int) -> dict[str, Any]:
    """Compiles one launch for one generation and returns its row, as in `usage`."""
    signature, constants, aligned = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or _is_one(value):
            # Triton makes a constant of None and of the number 1 too.
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type(value)
        # Tensors of torch start on such a boundary.
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    with _fusion_as_on_a_gpu():
        kernel = triton.compile(source, target=target, options=launch.options)
    text = _resources(kernel.asm["cubin"])
    return {
        "kernel": launch.kernel.__name__,
        "capability": capability,
        "constants": {
            name: value
            for name, value in constants.items()
            if isinstance(value, (int, float, bool)) or value is None
        },
        "dtypes": {
            name: str(value.dtype).removeprefix("torch.")
            for name, value in launch.arguments.items()
            if isinstance(value, torch.Tensor)
        },
        "num_warps": launch.options.get("num_warps", 4),
        "num_stages": launch.options.get("num_stages", 3),
        "registers": _number(r"REG:(\d+)", text),
        "shared_bytes": kernel.metadata.shared + _number(r" SHARED:(\d+)", text),
        "spill_bytes": _number(r"STACK:(\d+)", text) + _number(r"LOCAL:(\d+)", text),
    }


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value == 1


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def _resources(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_BINARIES / "cuobjdump"), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise AssertionError(f"cuobjdump printed no {pattern}: {text}")
    return int(found[1])


@contextmanager
def _fusion_as_on_a_gpu() -> Iterator[None]:
    # Stated, because the default changes between releases of Triton.
    before = os.environ.get("TRITON_DEFAULT_FP_FUSION")
    os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_DEFAULT_FP_FUSION"]
        else:
            os.environ["TRITON_DEFAULT_FP_FUSION"] = before

"""Decides which implementation of an operation runs.

The environment variable `FD_KERNELS` selects the implementation:

- `auto` (default): on CUDA, Triton in the tested cases of an operation, and torch.compile for
  operations without a kernel in this package; else the reference.
- `triton`: as `auto`, but an error if Triton cannot run at all. On a CPU the kernels run in
  Triton's interpreter, which `TRITON_INTERPRET=1` must turn on; on the meta device only shapes are
  computed.
- `compiled`: the reference through torch.compile everywhere.
- `apex`: NVIDIA apex's FusedLayerNorm for plain norms on CUDA, the rest as in `auto`.
- `reference`: plain torch everywhere.

`OPERATION=IMPLEMENTATION` after a comma selects the implementation of a single operation, as in
`auto,residual_norm=compiled`.

Selecting an implementation that is not installed is an error, never a silent fallback. An
untested case runs on the reference, which is logged.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

import torch

from fd_large.errors import ConfigError, nearest

Implementation = Literal["triton", "compiled", "apex", "reference"]

log = logging.getLogger(__name__)

# apex's fused kernels exist for CUDA only; elsewhere the reference runs.
APEX_DEVICES = ("cuda",)
_WISHES = ("auto", "triton", "compiled", "apex", "reference")
# The files of this package that register operations.
_FILES = ("add_norm", "quick_gelu", "residual_norm", "whitened_loss", "window_attention")
# A100, H100 and H200, for which the kernels are compiled ahead of time. Other cards of 8.x have
# less shared memory per program than some kernels need.
CAPABILITIES = ((8, 0), (9, 0))
_NO_TRITON = "no package triton, expected triton>=3.2"


class _Operation(NamedTuple):
    untested: Callable[..., str] | None
    apex_untested: Callable[..., str] | None


_operations: dict[str, _Operation] = {}
_refused: dict[str, str] = {}


class Device(NamedTuple):
    """A device that the meta device imitates when an implementation is chosen.

    Attributes:
        capability: Compute capability of an NVIDIA card, such as (9, 0); None if neither fused
            kernels nor torch.compile run by default.
        on_gpu: Whether the device is a GPU.
        wish: Value of FD_KERNELS for the device; "auto" is also the value of an unset variable.
    """

    capability: tuple[int, int] | None
    on_gpu: bool = True
    wish: str = "auto"


def register(
    op: str,
    untested: Callable[..., str] | None = None,
    apex_untested: Callable[..., str] | None = None,
) -> None:
    """Registers an operation; the file that defines an operation calls this once.

    Args:
        op: Name of the operation.
        untested: Function that takes a case as keyword arguments, and returns the reason why the
            Triton kernels are not tested in the case, or "" if the kernels are tested. None for an
            operation without Triton kernels, for which torch.compile is as good.
        apex_untested: A function like `untested` for apex's kernel; None if apex has no kernel.
    """
    _operations[op] = _Operation(untested, apex_untested)


def refuse(op: str, why: str) -> None:
    """Makes an operation run on its reference from now on.

    Args:
        op: A registered operation.
        why: Short reason, for the log.
    """
    _refused[op] = why
    _implementation.cache_clear()


def refused() -> Mapping[str, str]:
    """Returns the operations that `refuse` turned off, each with its reason."""
    return _refused


def reset() -> None:
    """Forgets all choices and logged messages, and which operations `refuse` has turned off.

    This is needed if the environment variable FD_KERNELS changes.
    """
    _refused.clear()
    for cached in (_implementation, _say, apex_layer_norm):
        cached.cache_clear()


# Set by `with` blocks, for all threads: autograd's threads choose too, in a recomputed forward.
_only_references = False
_stood_for: Device | None = None
_listeners: list[list[tuple[str, Implementation]]] = []


@contextmanager
def references() -> Iterator[None]:
    """Makes every operation in the block run on its reference."""
    global _only_references
    before, _only_references = _only_references, True
    try:
        yield
    finally:
        _only_references = before


@contextmanager
def standing_in(device: Device) -> Iterator[None]:
    """Within the `with` block, the meta device gets the implementations that `device` would get."""
    global _stood_for
    before, _stood_for = _stood_for, device
    try:
        yield
    finally:
        _stood_for = before


def stood_for() -> Device | None:
    """Returns the device that the meta device imitates, or None outside of `standing_in`."""
    return _stood_for


@contextmanager
def hearing() -> Iterator[list[tuple[str, Implementation]]]:
    """Records an (operation, implementation) pair for each choice in the block; yields the list."""
    heard: list[tuple[str, Implementation]] = []
    _listeners.append(heard)
    try:
        yield heard
    finally:
        _listeners.pop()


def may_run_kernels(device_type: str) -> bool:
    """Returns whether operations on devices of the type `device_type` may run kernels.

    Kernels are all implementations other than the reference; they need a check.
    """
    general, single = _wishes(wished())
    wishes = {general, *single.values()} - {"reference"}
    if device_type == "cuda":
        return bool(wishes)
    return "compiled" in wishes or ("triton" in wishes and _interpreted())


def wished() -> str:
    """Returns the value of FD_KERNELS, or `auto` if it is not set.

    Raises: ConfigError: if the value names an unknown implementation or operation.
    """
    wish = os.environ.get("FD_KERNELS", "") or "auto"
    _wishes(wish)
    return wish


@lru_cache(maxsize=16)
def _wishes(text: str) -> tuple[str, dict[str, str]]:
    """Parses `text`, a value of the environment variable FD_KERNELS.

    Returns: the implementation for all operations, which is "auto" if `text` names none;
        {operation: implementation} for single operations.
    Raises: ConfigError: if an implementation or an operation is unknown.
    """
    general, single = "auto", {}
    for part in text.split(","):
        op, is_single, wish = part.strip().rpartition("=")
        if wish not in _WISHES:
            raise ConfigError(
                f"FD_KERNELS: unknown implementation; got {wish!r}, {nearest(wish, _WISHES)}. Set "
                "FD_KERNELS to one of these, or unset it."
            )
        if not is_single:
            general = wish
            continue
        for name in _FILES:
            importlib.import_module(f"fd_large.kernels.{name}")
        if op not in _operations:
            raise ConfigError(
                f"FD_KERNELS: unknown operation; got {op!r}, {nearest(op, tuple(_operations))}. "
                "Name one of these, or no operation to set all of them."
            )
        single[op] = wish
    return general, single


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def implementation(op: str, device_type: str, **case: Any) -> Implementation:
    """Returns the implementation of an operation: `triton`, `compiled`, `apex` or `reference`.

    Args:
        op: A registered operation.
        device_type: "cuda", "cpu", "meta" or another device type of torch.
        case: Dtypes, widths and other hashable values that decide whether kernels are tested.

    Raises: ConfigError: if the requested implementation cannot run on this device.
    """
    if _only_references:
        return "reference"
    device = _stood_for if device_type == "meta" else None
    general, single = _wishes(device.wish if device else wished())
    wish, items = single.get(op, general), tuple(sorted(case.items()))
    choice, why = _implementation(op, device_type, wish, _interpreted(), device, items)
    if device_type != "meta":
        _say(op, device_type, choice, why)
    for heard in _listeners:
        heard.append((op, choice))
    return choice


@lru_cache(maxsize=256)
def _say(op: str, device_type: str, choice: str, why: str) -> None:
    # Cached: one line per operation and reason, not per shape.
    log.debug("%s on %s: %s (%s)", op, device_type, choice, why)


@lru_cache(maxsize=4096)
def _implementation(
    op: str,
    device_type: str,
    wish: str,
    interpreted: bool,
    device: Device | None,
    items: tuple[tuple[str, Any], ...],
) -> tuple[Implementation, str]:
    """Returns the implementation of an operation, and a message that says why it was chosen.

    Args:
        op: A registered operation.
        device_type: "cuda", "cpu", "meta" or another device type of torch.
        wish: The implementation that FD_KERNELS selects for this operation, or "auto".
        interpreted: Whether Triton's interpreter is on.
        device: Device that the meta device imitates; None for none.
        items: (name, value) pairs of the case, such as dtypes and widths.
    """
    operation, case = _operations[op], dict(items)
    if wish == "reference":
        return "reference", "FD_KERNELS=reference"
    if op in _refused:
        return "reference", _refused[op]
    if wish == "apex" and operation.apex_untested is not None and device_type != "meta":
        if device_type not in APEX_DEVICES:
            raise ConfigError(
                f"FD_KERNELS: apex has no kernel for this device; got {device_type}, expected "
                f"{' or '.join(APEX_DEVICES)}. Unset FD_KERNELS here."
            )
        if not operation.apex_untested(**case):
            return "apex", "FD_KERNELS=apex"
    no_compiler = _compile_problem(device_type, device)
    no_triton = _triton_problem(device_type, interpreted, device)
    problem = {"compiled": no_compiler, "triton": no_triton}.get(wish)
    if problem and device is None:
        program = "torch.compile" if wish == "compiled" else wish
        raise ConfigError(
            f"FD_KERNELS: {program} cannot run here; got {problem}. Unset FD_KERNELS here."
        )
    if wish == "compiled":
        return "compiled", "FD_KERNELS=compiled"
    on_gpu = device_type == "cuda" if device is None else device.on_gpu
    if wish != "triton" and device is None and not on_gpu:
        return "reference", "fused kernels are for CUDA"
    if operation.untested is None:
        problem = no_compiler if on_gpu else "plain on CPUs"
        return ("reference", problem) if problem else ("compiled", "torch.compile, no own kernel")
    if no_triton:
        return "reference", f"no Triton: got {no_triton}"
    untested = operation.untested(**case)
    if untested:
        return "reference", f"not tested in Triton: {untested}"
    return "triton", "interpreted" if device_type == "cpu" else f"FD_KERNELS={wish}"


def _triton_problem(device_type: str, interpreted: bool, device: Device | None) -> str:
    """Returns why this package's Triton kernels cannot run on a device, or "" if they can.

    Args:
        device_type: "cuda", "cpu", "meta" or another device type of torch.
        interpreted: Whether Triton's interpreter is on, in which kernels run on a CPU.
        device: Device that the meta device imitates; None for none. Without it, kernels can run on
            the meta device, where only shapes are computed.
    """
    if device is not None:
        capability = device.capability
    elif device_type == "meta":
        return ""
    elif find_spec("triton") is None:
        return _NO_TRITON
    elif device_type == "cpu":
        return "" if interpreted else "device cpu, expected cuda or TRITON_INTERPRET=1"
    elif device_type != "cuda":
        return f"device {device_type}, expected cuda"
    elif torch.version.hip:
        # By its capability an MI200 could not be distinguished from an H100: both say (9, 0).
        return "an AMD GPU, where the kernels were never tried (docs/amd.md)"
    else:
        capability = torch.cuda.get_device_capability()
    if capability in CAPABILITIES:
        return ""
    return f"compute capability {capability}, expected one of {CAPABILITIES}"


def _compile_problem(device_type: str, device: Device | None) -> str:
    """Returns why torch.compile cannot run on a device, or "" if no reason is known in advance.

    Args:
        device_type: "cuda", "cpu", "meta" or another device type of torch.
        device: Device that the meta device imitates; None for none.
    """
    if device is not None:
        return "" if device.capability else "another GPU"
    if device_type != "cuda":
        return ""
    if find_spec("triton") is None:
        return _NO_TRITON
    capability = torch.cuda.get_device_capability()
    return (
        "" if capability >= (7, 0) else f"compute capability {capability}, expected (7, 0) or more"
    )


def has_nvidia_apex() -> bool:
    """Returns whether NVIDIA apex is installed.

    The package named `apex` on PyPI is another project; only NVIDIA's package has FusedLayerNorm
    and FusedAdam.
    """
    if find_spec("apex") is None:
        return False
    try:
        normalization = importlib.import_module("apex.normalization")
        optimizers = importlib.import_module("apex.optimizers")
    except ImportError:
        return False
    return hasattr(normalization, "FusedLayerNorm") and hasattr(optimizers, "FusedAdam")


@lru_cache(maxsize=1)
def apex_layer_norm() -> Callable:
    """Returns NVIDIA apex's fused affine LayerNorm function.

    Raises: ConfigError: if NVIDIA apex is not installed.
    """
    if has_nvidia_apex():
        module = importlib.import_module("apex.normalization.fused_layer_norm")
        return module.fused_layer_norm_affine
    raise ConfigError(
        "FD_KERNELS=apex: NVIDIA apex is not installed (the package of that name on the index is "
        "another project); got none, expected apex.normalization.FusedLayerNorm and FusedAdam. "
        "Build it from NVIDIA's source or unset FD_KERNELS."
    )

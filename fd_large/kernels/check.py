"""Compares a run's fused operations with their references, on the device of the run.

Kernels are compiled for cards on which they may never have run, and a wrong kernel would corrupt
training silently. So a run records at its start the calls that its models make on the meta device
(`recording`). Each distinct call then runs forward and backward on random numbers for two images,
three times: fused, in plain torch with the same data types, and in plain torch with wider data
types. If the fused result is much farther from the wide result than the plain result is, all ranks
run the operation's reference from then on (`check`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fd_large.kernels import choose
from fd_large.ranks import distributed

log = logging.getLogger(__name__)

IMAGES = 2
# The implementations that have to be compared with a reference.
FUSED = ("triton", "compiled")


@dataclass(frozen=True)
class Shape:
    """Shape and data type of a tensor, without its values.

    Attributes:
        size: Shape of the tensor.
        dtype: Data type of the tensor.
        learns: Whether the tensor takes a gradient.
    """

    size: tuple[int, ...]
    dtype: torch.dtype
    learns: bool


@dataclass(frozen=True)
class Call:
    """A call of an operation that runs on a kernel of this package or of torch.compile.

    Attributes:
        function: The operation's public function.
        arguments: Positional arguments, with a `Shape` for a tensor.
        named: (name, value) of each keyword argument, with a `Shape` for a tensor.
        kernels: Names of the operations in the call for which `choose` selected "triton" or
            "compiled".
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]
    kernels: tuple[str, ...]


_calls: dict[Call, None] | None = None


@contextmanager
def recording() -> Iterator[dict[Call, None]]:
    """Records the distinct calls of `checked` functions that run a kernel in the block.

    Yields the calls as the keys of a dict, in order.
    """
    global _calls
    _calls = {}
    try:
        yield _calls
    finally:
        _calls = None


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates an operation's public function `function` so that `recording` sees its calls."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if _calls is None:
            return function(*arguments, **named)
        with choose.hearing() as heard:
            result = function(*arguments, **named)
        kernels = tuple(dict.fromkeys(op for op, choice in heard if choice in FUSED))
        if kernels:
            learns = torch.is_grad_enabled()
            shapes, named_shapes = tree_map_only(
                Tensor,
                lambda t: Shape(tuple(t.shape), t.dtype, learns and t.requires_grad),
                (arguments, named),
            )
            _calls[Call(call, shapes, tuple(named_shapes.items()), kernels)] = None
        return result

    return call


def check(calls: Sequence[Call], device: torch.device) -> None:
    """Compares each call with its reference, and turns off an operation that is wrong on any rank.

    All ranks must call this function.

    Args:
        calls: Calls from `recording`, the same on all ranks.
        device: Device on which the operations will run.
    """
    errors = beside_references(calls, device)
    for number, off in enumerate(distributed.gather_objects(errors)):
        for op, why in off.items():
            if op not in choose.refused():
                log.warning(
                    "%s: its kernel differs from its reference on rank %d, so that all ranks run "
                    "the reference: %s",
                    op,
                    number,
                    why,
                )
                choose.refuse(op, f"its kernel was off on rank {number}")
    if calls:
        names = sorted({op for call in calls for op in call.kernels} - choose.refused().keys())
        log.debug("kernels agree with their references: %s", ", ".join(names) or "none")


def beside_references(calls: Sequence[Call], device: torch.device) -> dict[str, str]:
    """Returns the operations that are wrong on this rank, each with a description of its error.

    If a call is wrong, all of its operations are in the result (`Call.kernels`).

    Args:
        calls: Calls from `recording`.
        device: Device on which the calls are made.
    """
    off: dict[str, str] = {}
    for call in calls:
        if why := _off(call, device):
            off |= {op: why for op in call.kernels if op not in off}
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return off


def _off(call: Call, device: torch.device) -> str | None:
    leaves = tree_leaves((call.arguments, dict(call.named)))
    shapes = [leaf for leaf in leaves if isinstance(leaf, Shape)]
    generator = torch.Generator(device).manual_seed(0)
    values = [
        torch.randn(s.size, generator=generator, device=device, dtype=torch.float32).to(s.dtype)
        for s in shapes
    ]
    label = f"{call.function.__name__} of {', '.join(str(s.size) for s in shapes)}"
    narrow = any(s.dtype == torch.bfloat16 for s in shapes)
    try:
        # Before the kernel runs: if it writes out of bounds, it might spoil these results too.
        exact = _run(call, values, wide=torch.float32 if narrow else torch.float64)
        eager = _run(call, values)
    except torch.OutOfMemoryError:
        log.debug("%s: not checked, as the reference does not fit into memory", label)
        return None
    try:
        fused = _run(call, values, fused=True)
    except Exception as error:  # Whatever a compiler or a launch raises.
        return f"{label} fails: {type(error).__name__}: {error}"
    if failed := [op for op in call.kernels if op in choose.refused()]:
        return f"{label} fails: {choose.refused()[failed[0]]}"
    for number, (got, plain, right) in enumerate(zip(fused, eager, exact, strict=True)):
        right = right.double()
        error, magnitude = (got.double() - right).abs(), right.abs()
        bound = 4 * (plain.double() - right).abs().max() + 1e-5 * magnitude.max()
        # A result in bfloat16 may be rounded to either side.
        bound = bound + magnitude * (2**-7 if got.dtype == torch.bfloat16 else 0)
        # Not `(error > bound).any()`, which is false for NaN.
        if not bool((error <= bound).all()):
            worst = (error - bound).nan_to_num(torch.inf).argmax()
            return (
                f"{label}: result {number + 1} of {len(fused)} has an error of "
                f"{error.flatten()[worst]:.2g}, expected at most {bound.flatten()[worst]:.2g}"
            )
    return None


def _run(
    call: Call, values: list[Tensor], *, fused: bool = False, wide: torch.dtype | None = None
) -> list[Tensor]:
    """Runs a call, and returns its results followed by the gradients of its arguments.

    Args:
        call: The call to run.
        values: Tensors for the call's `Shape`s, in order.
        fused: Whether to run the kernels instead of the reference.
        wide: Data type in place of all others; None to keep the call's data types.
    """
    inputs = iter(values)
    leaves: list[Tensor] = []

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, torch.dtype):
            return wide or leaf
        if not isinstance(leaf, Shape):
            return leaf
        value = next(inputs)
        value = value.to(wide or value.dtype, copy=True).requires_grad_(leaf.learns)
        leaves.append(value)
        return value

    arguments, named = tree_map(fill, (call.arguments, dict(call.named)))
    learning = [leaf for leaf in leaves if leaf.requires_grad]
    with nullcontext() if fused else choose.references(), torch.set_grad_enabled(bool(learning)):
        results = tree_leaves(call.function(*arguments, **named))
        differentiable = [r for r in results if r.requires_grad]
        if not differentiable:
            return results
        generator = torch.Generator(values[0].device).manual_seed(1)
        weights = [
            torch.randn(r.shape, generator=generator, device=r.device).to(r.dtype)
            for r in differentiable
        ]
        gradients = torch.autograd.grad(
            differentiable, learning, weights, allow_unused=True, materialize_grads=True
        )
    return [r.detach() for r in results] + list(gradients)

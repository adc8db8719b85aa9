"""What fused operations share: launches of kernels, plain torch versions, checks of shapes.

A launcher is an operation of torch over Triton kernels: it allocates the results and passes each
kernel to `launch`. If tensors have no values (on the meta device, or while torch.compile traces),
`launch` starts nothing, so that the same function gives the shapes of results. Triton is imported
when the first kernel starts. A backward pass is a separate operation, so that torch.compile and the
meta device see every tensor read or written.

The plain torch version of an operation (its twin) is compiled if `choose.py` says so, with one
compiled function for each width. Compiling the function instead of its module avoids graph breaks
under ZeRO-3, and all blocks of a width and batches of any size share one graph. In a region that is
itself being compiled, the twin is a part of that region.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fd_large.errors import ShapeError
from fd_large.kernels import choose

log = logging.getLogger(__name__)


class Launch(NamedTuple):
    """A launch of a kernel.

    Attributes:
        kernel: "MODULE.FUNCTION" in this package.
        grid: Number of programs in each dimension.
        arguments: Tensors and numbers, in the kernel's order.
        constants: Compile-time constants by name, and Triton's options.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


# The list that records kernels instead of starting them; each thread has its own.
_launches: ContextVar[list[Launch] | None] = ContextVar("launches", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Records the launches in the block instead of starting kernels; yields their list."""
    written = _launches.get()
    token = _launches.set([] if written is None else written)
    try:
        yield _launches.get()
    finally:
        _launches.reset(token)


def launch(kernel: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Starts a kernel on the device of its tensors, or only records the launch in `recording`.

    Args:
        kernel: "MODULE.FUNCTION" in this package.
        grid: Number of programs in each dimension.
        arguments: Tensors and numbers, in the kernel's order.
        constants: Compile-time constants by name, and Triton's options.
    """
    if (written := _launches.get()) is not None:
        written.append(Launch(kernel, grid, arguments, constants))
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    # A launch takes the current GPU.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        function_of(kernel)[grid](*arguments, **constants)


def function_of(kernel: str) -> Any:
    """Returns the Triton function with the name `kernel`, which has the form "MODULE.FUNCTION"."""
    module, _, function = kernel.partition(".")
    return getattr(import_module(f"fd_large.kernels.{module}"), function)


def operation(name: str) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Returns a decorator that registers a launcher as an operation of torch.

    A launcher is a function that starts Triton kernels. The operation's schema follows from the
    launcher's annotations. The launcher gets contiguous tensors. If the launcher returns None for
    an unneeded result, the operation returns an empty tensor, because the results of an operation
    cannot be None.

    Args:
        name: NAME of the operation torch.ops.fd_large.NAME.
    """

    def register(launcher: Callable[..., tuple[Tensor | None, ...]]) -> torch.library.CustomOpDef:
        def run(*arguments: Any) -> tuple[Tensor, ...]:
            arguments = tuple(a.contiguous() if isinstance(a, Tensor) else a for a in arguments)
            like = next(a for a in arguments if isinstance(a, Tensor))
            return tuple(like.new_empty(0) if r is None else r for r in launcher(*arguments))

        def shapes(*arguments: Any) -> tuple[Tensor, ...]:
            with recording():
                return run(*arguments)

        defined = torch.library.custom_op(
            f"fd_large::{name}",
            run,
            mutates_args=(),
            schema=torch.library.infer_schema(launcher, mutates_args=()),
        )
        defined.register_fake(shapes)
        return defined

    return register


def blocks(size: int, block: int) -> int:
    """Returns how many blocks of `block` elements hold `size` elements."""
    return -(-size // block)


def check_shapes(where: str, beside: str, **tensors: tuple[Tensor | None, tuple[int, ...]]) -> None:
    """Checks shapes, because a kernel would read past the end of a tensor that is too small.

    Args:
        where: Name of the function, for the message.
        beside: Description of what the tensors must fit, for the message.
        tensors: Each tensor with its expected shape; None in place of a tensor is accepted.

    Raises: ShapeError: if a tensor has another shape.
    """
    for name, (tensor, shape) in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ShapeError(
                f"{where}: {name} does not fit {beside}; got {tuple(tensor.shape)}, expected "
                f"{tuple(shape)}. Pass a tensor of that shape."
            )


def backend(device_type: str) -> str:
    """Returns torch.compile's backend for devices of the type `device_type`.

    The backend is "inductor" for "cuda", else "aot_eager". With "aot_eager" the same graphs as on a
    GPU are traced and differentiated, but run in eager kernels, without a C++ compiler.
    """
    return "inductor" if device_type == "cuda" else "aot_eager"


def twin(
    op: str, choice: choose.Implementation, reference: Callable[..., Any], *batched: Tensor | None
) -> Callable[..., Any]:
    """Returns the plain torch version of an operation, compiled if `choice` is "compiled".

    On the meta device and inside another compiled region, the version is returned uncompiled.

    Args:
        op: Name of the operation.
        choice: Result of `choose.implementation`.
        reference: The plain torch version.
        batched: Arguments whose first dimension is the batch.
    """
    first = batched[0]
    if choice != "compiled" or first is None or first.is_meta or torch.compiler.is_compiling():
        return reference
    for tensor in batched:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled(op, reference, backend(first.device.type), first.shape[-1])


@lru_cache(maxsize=256)
def _compiled(
    op: str, reference: Callable[..., Any], backend: str, channels: int
) -> Callable[..., Any]:
    """Returns `reference` compiled for tensors of one width.

    If compilation fails in a call, the returned function logs a warning, turns the operation off
    (`choose.refuse`), and runs `reference`.

    Args:
        op: Name of the operation.
        reference: The plain torch version of the operation.
        backend: Name of torch.compile's backend.
        channels: The width, which is a key of this function's cache. torch limits the number of
            graphs of a function, so that each width has a function of its own.
    """
    compiled = torch.compile(reference, backend=backend, isolate_recompiles=True)

    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return compiled(*arguments, **named)
        except torch._dynamo.exc.TorchDynamoException as error:
            message = str(error).strip().partition("\n")[0]
            log.warning("%s: torch.compile failed, and plain torch runs instead: %s", op, message)
            choose.refuse(op, "torch.compile failed")
            return reference(*arguments, **named)

    return call

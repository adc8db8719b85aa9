"""Operations of torch over Triton kernels: the launcher is the operation, and tells its shapes.

A launcher makes the results and hands each kernel to `launch`. Where tensors have no values (on the
meta device, or while torch.compile traces), `launch` starts nothing, so that the same function says
what comes out. Triton is imported when the first kernel starts.

Operations take and give contiguous tensors. A result that was not asked for has no elements,
because an operation's result cannot be None. A backward pass is an operation of its own, so that
torch.compile and the meta device see every tensor that is read or written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One start of a kernel.

    Attributes:
        kernel: "MODULE.FUNCTION" in this room.
        grid: Numbers of programs.
        arguments: Tensors and numbers, in the kernel's order.
        constants: The rest by name, with Triton's options.
    """

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]


# Where kernels are written down in place of being started; a thread's own.
_launches: ContextVar[list[Launch] | None] = ContextVar("launches", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it kernels do not start; they are written down."""
    written = _launches.get()
    token = _launches.set([] if written is None else written)
    try:
        yield _launches.get()
    finally:
        _launches.reset(token)


def launch(kernel: str, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Starts a kernel on the device of its tensors; arguments as of `Launch`."""
    if (written := _launches.get()) is not None:
        written.append(Launch(kernel, grid, arguments, constants))
        return
    device = next(a.device for a in arguments if isinstance(a, Tensor))
    # A launch takes the current GPU.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        function_of(kernel)[grid](*arguments, **constants)


def function_of(kernel: str) -> Any:
    """Returns the Triton function of a `Launch`."""
    module, _, function = kernel.partition(".")
    return getattr(import_module(f"fd_large.kernels.{module}"), function)


def operation(name: str) -> Callable[[Callable[..., Any]], torch.library.CustomOpDef]:
    """Registers a launcher as torch.ops.fd_large.NAME, by its annotations."""

    def register(launcher: Callable[..., Any]) -> torch.library.CustomOpDef:
        def shapes(*arguments: Any) -> Any:
            with recording():
                return launcher(*arguments)

        defined = torch.library.custom_op(f"fd_large::{name}", launcher, mutates_args=())
        defined.register_fake(shapes)
        return defined

    return register


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Returns a contiguous tensor, or None for None."""
    return None if tensor is None else tensor.contiguous()


def blocks(size: int, block: int) -> int:
    """Returns how many blocks hold so many elements."""
    return -(-size // block)

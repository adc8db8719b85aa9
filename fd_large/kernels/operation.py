"""Registers a Triton launcher as an operation of torch, so that torch.compile can look past it.

Operations take and give contiguous tensors. A result that was not asked for has no elements,
because an operation's result cannot be None. A backward pass is an operation of its own, so that
torch.compile and the meta device see every tensor that is read or written.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor


def operation(schema: str, launcher: str, empty: Callable[..., Any]) -> torch.library.CustomOpDef:
    """Registers torch.ops.fd_large.NAME.

    Args:
        schema: "NAME(Tensor x, ...) -> Tensor", in torch's schema language.
        launcher: "MODULE.FUNCTION" in this room, which takes these arguments and gives these
            results. The module is imported at the first call, because it needs Triton.
        empty: Takes the arguments, returns empty tensors shaped like the results.
    """
    name, bracket, signature = schema.partition("(")
    module, _, function = launcher.partition(".")

    @cache
    def launch() -> Callable[..., Any]:
        return getattr(import_module(f"fd_large.kernels.{module}"), function)

    defined = torch.library.custom_op(
        f"fd_large::{name}",
        lambda *arguments: launch()(*arguments),
        mutates_args=(),
        schema=bracket + signature,
    )
    defined.register_fake(empty)
    return defined


def contiguous(tensor: Tensor | None) -> Tensor | None:
    """Returns a contiguous tensor, or None for None."""
    return None if tensor is None else tensor.contiguous()

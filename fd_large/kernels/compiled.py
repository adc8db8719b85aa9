"""The plain twin of an operation through torch.compile: one compiled function for each case.

A function is compiled, not the module around it: there is no graph break under ZeRO-3, and all
blocks of a width share one graph. Batches of any size share it too. Within a region that is itself
being compiled, the twin is a part of that region.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fd_large.kernels import choose

log = logging.getLogger(__name__)


def backend(device_type: str) -> str:
    """Returns torch.compile's backend for a device.

    On CPUs the graphs that a GPU's compiler would be given are traced and differentiated, but run
    in eager kernels, which needs no C++ compiler.
    """
    return "inductor" if device_type == "cuda" else "aot_eager"


def twin(
    op: str, choice: choose.Implementation, reference: Callable[..., Any], *batched: Tensor | None
) -> Callable[..., Any]:
    """Returns the plain twin of an operation, through torch.compile where that was chosen.

    Args:
        op: Name of the operation.
        choice: What `choose.implementation` said.
        reference: The twin.
        batched: Those of its arguments whose first dimension is the batch.
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
    """A function for each number of channels, because torch limits the graphs of one."""
    compiled = torch.compile(reference, backend=backend, isolate_recompiles=True)

    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return compiled(*arguments, **named)
        except torch._dynamo.exc.TorchDynamoException as error:
            said = str(error).strip().partition("\n")[0]
            log.warning("%s: torch.compile failed, and plain torch runs instead: %s", op, said)
            choose.refuse(op, "torch.compile failed")
            return reference(*arguments, **named)

    return call

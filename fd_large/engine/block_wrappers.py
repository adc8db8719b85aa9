"""Wraps a student's blocks in activation checkpointing, and compiles them by torch.compile.

Mode `every` uses torch's non-reentrant checkpoint, which is exact under ZeRO-3, also for blocks
that recompute attention themselves. Random state is not saved, since drop-path masks are inputs.
Mode `offload` uses fairscale's wrapper, which moves the inputs of checkpointed blocks to host
memory. torch's `save_on_cpu` cannot move the inputs of a non-reentrant checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fd_large.errors import ConfigError
from fd_large.kernels.operation import backend
from fd_large.ranks import distributed

MODES = ("off", "every", "offload")


def checkpoint_blocks(blocks: Sequence[nn.Module], *, mode: str, every: int = 1) -> int:
    """Makes each `every`-th block checkpoint its activations; names of parameters do not change.

    Args:
        blocks: The blocks, in execution order.
        mode: "off" wraps no block. With "every", a wrapped block keeps only its input until
            backward; with "offload", it keeps this input in host memory.
        every: Distance between wrapped blocks: k wraps the blocks of index k-1, 2k-1, ...

    Returns: the number of blocks wrapped.
    Raises: ConfigError: if the mode is unknown or fairscale is missing.
    """
    if mode not in MODES:
        raise ConfigError(
            f"student.activation_checkpointing: unknown mode; got {mode!r}, expected one of "
            f"{', '.join(MODES)}. Choose one of these."
        )
    chosen = [] if mode == "off" else [block for i, block in enumerate(blocks, 1) if i % every == 0]
    for block in chosen:
        if mode == "offload":
            _fairscale_wrapper()(block, offload_to_cpu=True)
        else:
            block.forward = _recomputed(block.forward)
    return len(chosen)


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compiles the blocks' forward in place, before other code wraps them; keeps parameters' names.

    Blocks with the same computation on the same shapes share a compiled graph. Under ZeRO-3 the
    hooks that fetch a module's parameters break the graph, and the parts between the hooks are
    compiled.
    """
    compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
    for block in blocks:
        function = type(block).forward
        if function not in compiled:
            compiled[function] = torch.compile(
                function,
                backend=backend(distributed.device().type),
                dynamic=False,
                isolate_recompiles=True,
                # torch's own limit of 8, for each block, as if the blocks shared no graph.
                recompile_limit=8 * len(blocks),
            )
        block.forward = _moving(partial(compiled[function], block))


def _moving(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that reports progress to the watchdog, then calls a compiled forward.

    Its first call compiles for up to a minute, and the watchdog would take the compilation of
    dozens of blocks for a hang.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        distributed.moved()
        return compiled(*args, **kwargs)

    return forward


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def checkpointed(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return checkpointed


def _fairscale_wrapper() -> Callable[..., nn.Module]:
    try:
        from fairscale.nn.checkpoint import checkpoint_wrapper
    except ImportError:
        raise ConfigError(
            "student.activation_checkpointing: offload needs fairscale; got no package fairscale, "
            "expected fairscale>=0.4.13. Run `pip install fd_large[offload]`, or set "
            "--student.activation_checkpointing every."
        ) from None
    return checkpoint_wrapper

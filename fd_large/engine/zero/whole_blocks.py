"""Lets ZeRO-3 gather whole blocks, with one message and one set of hooks for all layers of a block.

DeepSpeed gathers the weights of every module before the module's forward and backward, and runs
hooks around every module, also around modules without weights. A block of a ViT has nine modules.
benchmarks/host_calls.py counts the calls that a block costs the host.

DeepSpeed's own leaf modules cannot be used: it sums a leaf's gradients when the leaf's backward is
over, and loses the later gradients of a submodule that is called outside of the leaf's forward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from torch import nn

from fd_large.engine.zero.private_names import get, replace
from fd_large.plan.buckets import gathered_whole

PREFETCH, GRANULARITY = "stage3_prefetch_bucket_size", "stage3_module_granularity_threshold"
DEFAULT = 50_000_000
"""DeepSpeed's default for the number of elements that are gathered ahead."""

_COORDINATOR = "deepspeed.runtime.zero.partitioned_param_coordinator"
_PARTITION = "deepspeed.runtime.zero.partition_parameters"
_iter_params = get(f"{_COORDINATOR}:iter_params")
_print_rank_0 = get(f"{_PARTITION}:print_rank_0")
_UNIT = "_gathered_whole"
"""Key in the `__dict__` of a block that is gathered whole, for the list of its parameters."""


def gather_whole(engine: Any, backbone: nn.Module, zero: dict[str, Any]) -> None:
    """Makes ZeRO-3 gather each block as one module, if its parameters fit the prefetch bucket.

    `plan/buckets.py` chooses these blocks, because `plan` counts them too.

    Args:
        engine: DeepSpeed's engine at stage 3, before its first forward. Without an optimiser the
            model is frozen, and the hooks for backward are removed.
        backbone: The engine's module, or a part of it.
        zero: The section `zero_optimization` of the filled DeepSpeed JSON.
    """
    _spare_calls()
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    if offload is engine.optimizer:
        for hook in offload.backward_hooks:
            hook.remove()
    # Where the threshold is set, DeepSpeed chooses modules by it.
    if zero.get(GRANULARITY):
        return
    inside: set[int] = set()
    units = gathered_whole(backbone, zero.get(PREFETCH, DEFAULT), attrgetter("ds_numel"))
    for unit, modules in units.items():
        # On the module, so that the list is freed with it: a parameter refers to its engine.
        unit.__dict__[_UNIT] = [p for m in modules for p in m.parameters(recurse=False)]
        for module in modules[1:]:
            inside |= {id(module._forward_hooks), id(module._forward_pre_hooks)}
    for hook in (*offload.forward_hooks, *offload.backward_hooks):
        if id(hook.hooks_dict_ref()) in inside:
            hook.remove()


def _spare_calls() -> None:
    """Removes from DeepSpeed's hooks the Python calls that do not gather, a third of all calls.

    The removed calls mark ranges for NVIDIA's profiler, or make log messages that are not printed.
    """
    replace(get("deepspeed.utils:nvtx"), "enable_nvtx", False)
    for module in (_COORDINATOR, _PARTITION):
        replace(get(module), "print_rank_0", _say_nothing)
    replace(get(_COORDINATOR), "iter_params", _parameters)


@functools.wraps(_print_rank_0)
def _say_nothing(message: str, debug: bool = False, force: bool = False) -> None:
    """Calls DeepSpeed's `print_rank_0`, which it replaces, only for messages that it would print.

    Other messages would still cost the host a call.
    """
    if debug or force:
        _print_rank_0(message, debug, force)


@functools.wraps(_iter_params)
def _parameters(module: nn.Module, recurse: bool = False) -> Iterable[nn.Parameter]:
    """Replaces DeepSpeed's `iter_params`, which returns the parameters of `module`.

    For a block that is gathered whole, these include the parameters of its submodules.
    """
    return module.__dict__.get(_UNIT) or _iter_params(module, recurse)

"""Orders the streams of ZeRO-3 on GPUs by events, so that each read follows its write.

DeepSpeed 0.19.8 gathers shards on a separate stream. DeepSpeed never makes that stream wait until
the optimiser has written the shards, but makes the host wait for hpZ's copies inside a node, once
for each parameter. Gradients are summed on another stream. A device without streams, such as a CPU,
needs no order. docs/architecture.md has a table of all places where streams are ordered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fd_large.engine.zero.private_names import replace
from fd_large.engine.zero.start import deepspeed

_STREAM = "_PartitionedParameterCoordinator__allgather_stream"
_GATHER = "_PartitionedParameterCoordinator__all_gather_params_"


class Init(deepspeed.zero.Init):
    """Shards parameters as DeepSpeed does, but without a wait of the host for hpZ's copies."""

    @torch.no_grad()
    def _partition_param_sec(
        self, param: Any, buffer: Any = None, has_been_updated: bool = False
    ) -> None:
        """Copies this rank's part of a gathered parameter to its secondary copy, for hpZ's gathers.

        An existing copy is overwritten only if `has_been_updated` says that the parameter has
        changed since. On a GPU, an event is recorded after the copy. `buffer` is ignored.
        """
        # A parameter that is not gathered has nothing to copy.
        is_there = param.ds_secondary_tensor is not None and not has_been_updated
        if is_there or param.data.numel() < param.ds_numel:
            return
        size = self._aligned_size(param) // self.num_ranks_in_param_group
        if param.ds_secondary_tensor is None:
            copy = torch.empty(size, dtype=param.dtype, device=self.remote_device)
            param.ds_secondary_tensor = copy.pin_memory() if self.pin_memory else copy
        begin = size * self.rank_in_group
        mine = param.data.view(-1)[begin : begin + size]
        param.ds_secondary_tensor[: mine.numel()].copy_(mine)
        param.ds_secondary_tensor[mine.numel() :].zero_()
        accelerator = deepspeed.accelerator.get_accelerator()
        if not accelerator.is_synchronized_device():
            param.copied_in_node = accelerator.current_stream().record_event()


def order_gathers(engine: Any) -> None:
    """Makes all-gathers of a sharded model wait for writes of the shards.

    All-gathers wait for the writes that were queued before this call. If the engine (at stage 3)
    has an optimiser, they also wait after each step for the optimiser's writes, and an all-gather
    of hpZ's copies inside a node waits until these copies are written.
    """
    accelerator = deepspeed.accelerator.get_accelerator()
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    coordinator = offload.get_param_coordinator()
    gathers = getattr(coordinator, _STREAM)
    if accelerator.is_synchronized_device():
        return
    gathers.wait_stream(accelerator.current_stream())
    if offload is engine.optimizer:
        return

    def gather(parameters: Iterable[Any], forward: bool, quantize: bool = False) -> None:
        for parameter in parameters:
            if parameter.ds_secondary_tensor is not None:
                gathers.wait_event(parameter.copied_in_node)
        plain_gather(parameters, forward, quantize)

    def write_back(group: int) -> None:
        plain(group)
        gathers.wait_stream(accelerator.current_stream())

    plain = replace(engine.optimizer, "_reassign_or_swap_out_partitioned_parameters", write_back)
    plain_gather = replace(coordinator, _GATHER, gather)


def record_gradients(engine: Any) -> None:
    """Keeps the memory of each gradient until the gradient is summed on its stream.

    DeepSpeed does so too, except for the gradient of a small tensor of which this rank has no
    element. `engine` is at stage 3, with an optimiser.
    """
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.is_synchronized_device():
        return

    def partition(parameters: Sequence[nn.Parameter], shards: Sequence[Tensor]) -> Any:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.record_stream(accelerator.current_stream())
        return plain(parameters, shards)

    plain = replace(engine.optimizer, "partition_grads", partition)

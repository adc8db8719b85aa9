"""Stage 3's streams on GPUs: what one reads is ordered, by an event, after what another wrote.

DeepSpeed 0.19.8 gathers shards on a stream of their own, which no line of its own lets wait for the
optimiser's write of them; it sums gradients on another one. On a device without streams, as a CPU,
nothing here does anything. docs/architecture.md has a table of all such places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from fd_large.engine.zero.private_names import replace
from fd_large.engine.zero.start import deepspeed

_GATHERS = "_PartitionedParameterCoordinator__allgather_stream"


def order_gathers(engine: Any) -> None:
    """Lets gathers of a sharded model wait for the writes of its shards, those until now too.

    Args:
        engine: DeepSpeed's engine at stage 3; without an optimiser nothing is written later.
    """
    accelerator = deepspeed.accelerator.get_accelerator()
    offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
    gathers = getattr(offload.get_param_coordinator(), _GATHERS)
    if accelerator.is_synchronized_device():
        return
    gathers.wait_stream(accelerator.current_stream())
    if offload is engine.optimizer:
        return

    def write_back(group: int) -> None:
        plain(group)
        gathers.wait_stream(accelerator.current_stream())

    plain = replace(engine.optimizer, "_reassign_or_swap_out_partitioned_parameters", write_back)


def record_gradients(engine: Any) -> None:
    """Keeps the memory of each gradient until it was summed.

    DeepSpeed does so itself but for tensors of which this rank has no element, which are those of
    fewer elements than there are ranks.
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

"""Keeps the optimiser's float32 state, and optionally the weights, in mapped files on a local disk.

Masters, moments, gradients and moving average of a rank are the tensors of DeepSpeed's offload to
host memory, but in memory-mapped files, so that all numbers equal those of that offload. The
operating system moves the least recently used pages to the disk. The bfloat16 weights are there too
if `offload_param` is on the disk.

DeepSpeed's own offload to a disk (ZeRO-Infinity, by libaio) is not used. Release 0.19.8 silently
trains wrong if a swapped gradient does not begin at a multiple of 512 bytes, and also keeps a
float32 gradient of the whole model in memory.

The files have no names, so that they vanish when the process ends, however it ends.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor, nn

from fd_large.engine.zero.optimizer import kept_by
from fd_large.engine.zero.private_names import get, replace
from fd_large.ranks import distributed
from fd_large.runtime import disks

_STAGE_3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"
_GRADIENTS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"


class Disk:
    """Makes tensors in memory-mapped files of a folder on a local disk."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def zeros(self, numel: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Returns a flat tensor of zeros, whose space on the disk is reserved until it is freed."""
        size = dtype.itemsize * numel
        with disks.refused(self._folder, size), tempfile.TemporaryFile(dir=self._folder) as file:
            # A mapped page without space on the disk would end the process by a signal, later.
            os.posix_fallocate(file.fileno(), 0, max(size, 1))
            # The mapping keeps the file alive, and no descriptor open.
            path = f"/proc/self/fd/{file.fileno()}"
            return torch.from_file(path, shared=True, size=numel, dtype=dtype)

    def take(self, parameters: Iterable[nn.Parameter]) -> None:
        """Moves this rank's float32 shards of `parameters` to the disk."""
        for parameter in parameters:
            shard = parameter.ds_tensor.data
            parameter.ds_tensor.data = self.zeros(shard.numel()).view_as(shard).copy_(shard)

    @contextmanager
    def holds_state(self, exact: dict[int, Tensor], *, weights: bool) -> Iterator[None]:
        """Lets a ZeRO-3 optimiser that is made in the block keep its float32 state on the disk.

        Args:
            exact: Flat float32 masters, by the `ds_id` of their parameters; masters that it lacks
                are copied from their parameters. Each value is removed once copied, so that the
                disk never holds all values twice.
            weights: Whether weights that are offloaded to host memory go to the disk too.
        """
        stage_3 = get(_STAGE_3)
        ways: dict[str, Any] = {"_setup_for_real_optimizer": partialmethod(_set_up, self, exact)}
        if weights:
            ways["_create_param_groups_fp16_flat_cpu_memory"] = partialmethod(_make_room, self)
        plain = {name: replace(stage_3, name, way) for name, way in ways.items()}
        try:
            yield
        finally:
            for name, way in plain.items():
                replace(stage_3, name, way)


def _make_room(optimizer: Any, disk: Disk) -> None:
    """Allocates the flat offloaded weights of each parameter group on the disk.

    Replaces DeepSpeed's `_create_param_groups_fp16_flat_cpu_memory`, which uses host memory.
    """
    for group in optimizer.trainable_param_groups:
        numel = sum(parameter.ds_tensor.numel() for parameter in group["params"])
        optimizer.param_groups_fp16_flat_cpu_memory.append(disk.zeros(numel, optimizer.dtype))


@torch.no_grad()
def _set_up(optimizer: Any, disk: Disk, exact: dict[int, Tensor]) -> None:
    """Makes masters, gradients and moments of an offloaded ZeRO-3 optimiser on the disk.

    Replaces DeepSpeed's `_setup_for_real_optimizer`. The gradient of a sub-group is a view of the
    flat buffer in which gradients are summed, whereas DeepSpeed makes a copy with the same elements
    in the same order. For `exact` see `Disk.holds_state`.
    """
    inner, sizes = optimizer.optimizer, optimizer.fp16_partitioned_groups_flat_numel
    state_fields, total = kept_by(inner), sum(sizes)
    parameters = [parameter for group in optimizer.fp16_groups for parameter in group]
    lengths = [parameter.ds_tensor.numel() for parameter in parameters]

    masters = disk.zeros(total)
    for parameter, master in zip(parameters, masters.split(lengths), strict=True):
        if (values := exact.pop(parameter.ds_id, None)) is None:
            values = parameter.ds_tensor.data.view(-1)
        # Beyond the end of a parameter are zeros.
        master[: values.numel()] = values
    gradients = disk.zeros(total)
    parts = zip(
        masters.split(sizes),
        gradients.split(sizes),
        *(disk.zeros(total).split(sizes) for _ in state_fields.moments),
        strict=True,
    )
    for master, gradient, *moments in parts:
        owner = master.data.requires_grad_()
        owner.grad = gradient
        optimizer.fp32_partitioned_groups_flat.append(owner)
        state = inner.state[owner]
        if state_fields.count is not None:
            state["step"] = state_fields.count(owner, 0)
        for (name, value), moment in zip(state_fields.moments.items(), moments, strict=True):
            state[name] = moment.fill_(value) if value else moment
    for group in inner.param_groups:
        # DeepSpeed fills in the sub-group that is stepped.
        group["params"] = []
    optimizer.subgroup_to_device = dict.fromkeys(range(len(sizes)), "cpu")
    if optimizer.contiguous_gradients:
        for dtype, bucket in optimizer.ipg_buckets.items():
            bucket.buffer = torch.empty(
                optimizer.reduce_bucket_size, dtype=dtype, device=distributed.device()
            )
    optimizer.grad_partitions_flat_buffer = gradients
    shards = zip(parameters, gradients.split(lengths), strict=True)
    setattr(optimizer, _GRADIENTS, {parameter.ds_id: shard for parameter, shard in shards})

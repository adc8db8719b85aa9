"""Builds sharded modules, loads weights into them, and sets exact float32 masters.

No other file depends on how ZeRO-3 shards a parameter: rank r of the process group holds the
elements [r*k, (r+1)*k) of the flattened parameter, with k = ceil(numel / ranks), and zeros beyond
the parameter's end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fd_large.backbones.initialization import HostDraws
from fd_large.engine.zero.disk import Disk
from fd_large.engine.zero.private_names import get
from fd_large.engine.zero.stream_order import Init
from fd_large.ranks import distributed
from fd_large.weights.coverage import Fitted, covered


def build(
    make: Callable[[], nn.Module],
    config: dict[str, Any],
    *,
    partitioned: bool,
    seed: int,
    group: Any = None,
    whole_first: bool = False,
    disk: Disk | None = None,
) -> nn.Module:
    """Builds a module in float32, whole or sharded, with the same values in both cases.

    Under `zero.Init` each submodule is sharded at the end of its constructor, so that a rank never
    holds more than its shards and one whole submodule.

    Args:
        make: Constructs the module; draws from torch's global generator only.
        config: A filled DeepSpeed configuration.
        partitioned: Whether the parameters are sharded over `group`.
        seed: Seed of torch's generator during construction; the caller's state is restored.
        group: Process group over which the parameters are sharded; None for all ranks.
        whole_first: Whether to build the whole module on every rank and shard it afterwards, for
            constructors that write to their children's parameters, as timm's do.
        disk: On CPUs, the disk to which new shards are moved; None to keep them in memory.
    """
    context = nullcontext()
    if partitioned:
        # float32 whatever the precision, since masters are to be exact: by a configuration without
        # bf16, because `dtype=torch.float32` gives bfloat16 on CPUs without float16 arithmetic.
        float32 = {key: value for key, value in config.items() if key not in ("bf16", "data_types")}
        # DeepSpeed makes the group of hpZ once in a process, and refuses to make it again for a
        # second engine.
        hpz = config["zero_optimization"].get("zero_hpz_partition_size", 1) > 1
        of_node = get("deepspeed.utils.groups:_ZERO_PARAM_INTRA_PARALLEL_GROUP") if hpz else None
        disk = disk if distributed.device().type == "cpu" else None
        split = partial(
            _split_onto(disk) if disk else Init,
            config_dict_or_path=float32,
            data_parallel_group=group,
            zero_param_parallel_group=of_node,
        )
        context = nullcontext() if whole_first else split()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Under `zero.Init` tensors are on the device at once, whose generator is another one.
        with context, HostDraws():
            module = make()
    if partitioned and whole_first:
        split(module=module)
        if disk:
            disk.take(module.parameters())
        # The engine assumes that a sharded module is on its device, buffers too.
        for child in module.modules():
            for name, buffer in child.named_buffers(recurse=False):
                setattr(child, name, buffer.to(distributed.device()))
    return module


def _split_onto(disk: Disk) -> Any:
    class OntoDisk(Init):
        def _post_init_method(self, module: nn.Module) -> None:
            super()._post_init_method(module)
            disk.take(module.parameters(recurse=False))

    return OntoDisk


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Returns whether ZeRO-3 has sharded `parameter`."""
    return hasattr(parameter, "ds_tensor")


def shard(parameter: nn.Parameter) -> tuple[Tensor, int]:
    """Returns this rank's elements of a parameter, and the position of the first in the parameter.

    The elements are a flat view without padding. A parameter that is not sharded counts as a single
    shard at position 0.
    """
    if not is_partitioned(parameter):
        return parameter.data.view(-1), 0
    padded = parameter.ds_tensor.data.view(-1)
    rank = torch.distributed.get_rank(parameter.ds_process_group)
    offset = rank * padded.numel()
    length = max(0, min(padded.numel(), parameter.ds_numel - offset))
    return padded[:length], min(offset, parameter.ds_numel)


def load_weights(module: nn.Module, items: Iterable[tuple[str, Tensor]], *, where: str) -> None:
    """Copies unsharded tensors into a module; all ranks must call this function.

    Only rank 0 reads the tensors and sends each to the other ranks, which keep the elements of
    their shards; otherwise a thousand ranks would read the same files from the file system.

    Running statistics of batch norms are weights too; every rank holds them whole.

    Args:
        module: A module with whole or partitioned parameters.
        items: Pairs (name in the module, unsharded tensor); those of rank 0 count. Tensors that the
            user allowed the file to lack keep their values.
        where: The field that the user set, for messages.

    Raises: WeightsError: if a tensor is missing, unexpected or of another shape.
    """
    targets = dict(module.named_parameters()) | running_statistics(module)
    expected = {
        name: tuple(tensor.ds_shape if is_partitioned(tensor) else tensor.shape)
        for name, tensor in targets.items()
    }
    gaps = items.may_be_missing if isinstance(items, Fitted) else frozenset()
    with torch.no_grad():
        tensors = covered(expected, items, where=where, may_be_missing=gaps)
        for name, tensor in distributed.tensors_of_main(tensors):
            target, offset = shard(targets[name])
            target.copy_(tensor.reshape(-1)[offset : offset + target.numel()])


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Returns the floating-point buffers of `module` that are in its state dict, by name."""
    persistent = module.state_dict().keys()
    return {
        name: buffer
        for name, buffer in module.named_buffers()
        if buffer.is_floating_point() and name in persistent
    }


def to_bfloat16(module: nn.Module, *, keep_exact: bool = False) -> dict[str, Tensor]:
    """Casts a module's parameters, whole or partitioned, from float32 to bfloat16 in place.

    Buffers that are combined with weights are cast by the module's `cast_buffers`, if it has this
    method. A bfloat16 engine copies its masters from the bfloat16 weights; `set_masters` then
    writes the exact values into the masters.

    With `keep_exact`, this rank's float32 shards are returned by name, for masters. Without, as for
    a frozen model, the result is empty, and each float32 tensor is freed before the next is cast.
    """
    exact = {}
    for name, parameter in module.named_parameters():
        if keep_exact:
            # Not a copy: below, another tensor replaces the parameter's.
            exact[name] = shard(parameter)[0].detach()
        if is_partitioned(parameter):
            parameter.ds_tensor.data = parameter.ds_tensor.data.bfloat16()
            # hpZ's copy inside the node, from which the first forward gathers.
            if getattr(parameter, "ds_secondary_tensor", None) is not None:
                secondary = parameter.ds_secondary_tensor
                secondary.data = secondary.data.bfloat16()
        parameter.data = parameter.data.bfloat16()
    for child in module.modules():
        if hasattr(child, "cast_buffers"):
            child.cast_buffers(torch.bfloat16)
    return exact


def set_masters(module: nn.Module, exact: dict[str, Tensor]) -> None:
    """Writes float32 masters into the optimiser of a bfloat16 engine at ZeRO stages 1 to 3.

    `module` is the engine's module, and `exact` the values of `to_bfloat16`. Each value is removed
    once written, so that memory never holds all values twice.
    """
    set_local = get("deepspeed.utils.tensor_fragment:safe_set_local_fp32_param")
    for name, parameter in module.named_parameters():
        values = exact.pop(name)
        if is_partitioned(parameter):
            padded = torch.zeros(parameter.ds_tensor.numel(), dtype=torch.float32)
            padded[: values.numel()] = values
            set_local(parameter, padded.to(values.device))
        elif (mapping := parameter._hp_mapping) is not None:
            # Stages 1 and 2: this rank owns a slice of the flattened parameter, or nothing.
            start = mapping.lp_fragment_address.start
            length = mapping.lp_fragment_address.numel
            mapping.get_hp_fragment().data.copy_(values[start : start + length])

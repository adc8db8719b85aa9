"""Reads and writes a rank's shards of a live run's masters, moments and moving average.

The functions work at any ZeRO stage, and no other file depends on where DeepSpeed (0.19.8) keeps
these shards, offloaded or not. The shards are views of the live state, so that reading them copies
nothing. Only `whole_masters`, `redistribute` and `complete` communicate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fd_large.checkpoint.layout import EachTensor, FlatGroups, Layout, Span
from fd_large.checkpoint.write import Piece
from fd_large.engine.zero import partition
from fd_large.engine.zero.engine import Engine
from fd_large.engine.zero.optimizer import kept_by
from fd_large.engine.zero.private_names import replace
from fd_large.ranks import distributed

EMA = "ema"
"""Key in the optimiser's state, and kind in a checkpoint, of the average that `ema.py` keeps."""
Read = Callable[[str, str, int, int], Tensor]
"""Function (kind, name, start, stop) -> elements [start, stop) of the flattened tensor."""


class _Home(NamedTuple):
    """Where the optimiser keeps this rank's elements of a parameter.

    Attributes:
        span: Range of these elements in the flattened parameter.
        master: View of the elements' float32 values.
        owner: The tensor that the inner optimiser steps, whose state holds the moments.
        offset: Position of the first element in `owner`.
    """

    span: Span
    master: Tensor
    owner: Tensor
    offset: int


def layout_of(engine: Engine) -> Layout:
    """Returns which elements of each tensor each rank stores in a checkpoint."""
    ranks = distributed.world_size()
    if engine.stage in (0, 3):
        sizes = {n: _numel(p) for n, p in engine.task.named_parameters()}
        sizes |= {name: buffer.numel() for name, buffer in _statistics(engine).items()}
        return EachTensor(sizes, ranks)
    optimizer = engine.deepspeed.optimizer
    names = {id(p): n for n, p in engine.task.named_parameters()}
    groups = getattr(optimizer, "bit16_groups", None) or optimizer.bf16_groups
    flats = _flat_partitions(optimizer)
    named = [tuple((names[id(p)], p.numel()) for p in group) for group in groups]
    shares = [flat.numel() for flat in flats]
    if statistics := _statistics(engine):
        named.append(tuple((name, buffer.numel()) for name, buffer in statistics.items()))
        shares.append(-(-sum(buffer.numel() for buffer in statistics.values()) // ranks))
    return FlatGroups(tuple(named), tuple(shares), ranks)


def _statistics(engine: Engine) -> dict[str, Tensor]:
    """Returns the task's running statistics, by name.

    They are whole and equal on all ranks; in a checkpoint each rank stores a shard.
    """
    return partition.running_statistics(engine.task)


def shards(engine: Engine) -> Iterator[Piece]:
    """Yields views of this rank's shards of masters, moments, average and running statistics.

    A shard's name is KIND.NAME: KIND is "master", the name of a moment, or the key of the moving
    average, and NAME is the parameter's name.
    """
    inner = engine.gate.inner
    for name, parameter in engine.task.named_parameters():
        home = _home(engine, parameter)
        if home is None or home.master.numel() == 0:
            continue
        yield Piece(f"master.{name}", home.master)
        state = optimizer_state(inner, home.owner)
        for kind in (*kept_by(inner).moments, EMA):
            if kind in state:
                yield Piece(f"{kind}.{name}", _part(state[kind], home))
    if statistics := _statistics(engine):
        layout = layout_of(engine)
        kinds = ("master", EMA) if has_average(engine) else ("master",)
        for name, buffer in statistics.items():
            start, stop = layout.span(distributed.rank(), name)
            average = engine.averages.get(name, buffer)
            for kind, values in zip(kinds, (buffer, average), strict=False):
                if start < stop:
                    yield Piece(f"{kind}.{name}", values.float().view(-1)[start:stop])


def not_finite(engine: Engine) -> list[str]:
    """Returns the names of this rank's shards that hold NaN or infinity, as `shards` yields them.

    Buffers that were not finite from the start (`Engine.infinite_buffers`) are left out. The check
    takes one pass over the shards without a copy, and the host waits once per device.
    """
    extremes: dict[torch.device, list[Tensor]] = defaultdict(list)
    keys: dict[torch.device, list[str]] = defaultdict(list)
    for key, values in shards(engine):
        if key.partition(".")[2] not in engine.infinite_buffers:
            # If a tensor contains a NaN, torch returns NaN as its minimum and maximum.
            extremes[values.device].append(torch.stack(torch.aminmax(values.detach())))
            keys[values.device].append(key)
    broken = []
    for device, rows in extremes.items():
        finite = torch.stack(rows).isfinite().all(1).tolist()
        broken += [key for key, fine in zip(keys[device], finite, strict=True) if not fine]
    return broken


def whole_masters(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, flat unsharded float32 tensor) of each parameter and running statistic.

    All ranks must iterate together. In a block of `Ema.in_place_of_weights`, the values are those
    of the average.
    """
    for name, parameter in engine.task.named_parameters():
        home = _home(engine, parameter)
        whole = torch.zeros(_numel(parameter), device=distributed.device())
        if home is not None:
            whole[home.span.start : home.span.stop] = home.master
        # Only one rank's values of an element are not zero, so that the sum is exact.
        yield name, distributed.sum_tensor(whole)
    for name, buffer in _statistics(engine).items():
        yield name, buffer.float().flatten()


def owned(engine: Engine) -> Iterator[tuple[str, Tensor, int, int]]:
    """Yields (name, owner, start, stop) for each parameter of which this rank steps elements.

    The elements are [start, stop) of `owner`, a tensor that the optimiser steps. At stage 0 every
    rank steps whole parameters.
    """
    for name, parameter in engine.task.named_parameters():
        home = _home(engine, parameter, whole=True)
        if home is not None and home.master.numel():
            yield name, home.owner, home.offset, home.offset + home.master.numel()


def written(engine: Engine) -> Iterator[Tensor]:
    """Yields the tensors that a step changes: weights, masters, moments, gradients."""
    yield from engine.gradients
    for parameter in engine.task.parameters():
        yield parameter.ds_tensor if partition.is_partitioned(parameter) else parameter.data
    for _, owner, _, _ in owned(engine):
        gradient = [] if owner.grad is None else [owner.grad]
        values = engine.gate.inner.state.get(owner, {}).values()
        moments = (value for value in values if isinstance(value, Tensor))
        yield from (owner.data, *gradient, *moments)


def has_average(engine: Engine) -> bool:
    """Returns whether this rank's state holds an average of the weights."""
    return any(EMA in engine.gate.inner.state[owner] for _, owner, _, _ in owned(engine))


def restore(engine: Engine, read: Read, *, finished: int, steps: int, ema: bool = False) -> None:
    """Writes this rank's shards of a stored state into an engine.

    `complete` must follow, on all ranks. If the engine keeps an average and the stored state has
    none, the average begins as a copy of the weights.

    Args:
        engine: The engine, between two steps or before the first.
        read: Reads elements of a stored tensor; called for this rank's own shards only.
        finished: Number of finished steps.
        steps: Number of finished steps that were not skipped, which is the optimiser's step count.
        ema: Whether the stored state has an average.
    """
    inner = engine.gate.inner
    owners: dict[int, Tensor] = {}
    with torch.no_grad():
        for name, parameter in engine.task.named_parameters():
            home = _home(engine, parameter)
            if home is None:
                continue
            owners[id(home.owner)] = home.owner
            if home.master.numel():
                home.master.copy_(read("master", name, *home.span))
                state = optimizer_state(inner, home.owner)
                for kind in kept_by(inner).moments:
                    _part(state[kind], home).copy_(read(kind, name, *home.span))
                if EMA in state:
                    _part(state[EMA], home).copy_(read(EMA if ema else "master", name, *home.span))
        for name, buffer in _statistics(engine).items():
            span = _own_span(buffer)
            buffer.view(-1)[slice(*span)].copy_(read("master", name, *span))
            average = engine.averages.get(name)
            if average is not None:
                average.view(-1)[slice(*span)].copy_(read(EMA if ema else "master", name, *span))
    for owner in owners.values():
        _set_steps(inner, owner, steps)
    for group in inner.param_groups:
        # DeepSpeed's and apex's FusedAdam count in the group.
        if "step" in group:
            group["step"] = steps
    replace(engine.deepspeed, "global_steps", finished)


def complete(engine: Engine) -> None:
    """Makes all tensors complete after `restore`; all ranks must call this function.

    Tensors that each rank holds whole are gathered from the other ranks, which is faster than if
    every rank read them from the files.
    """
    with torch.no_grad():
        for whole in _wholes(engine):
            start, stop = _own_span(whole)
            mine = whole.new_zeros(-(-whole.numel() // distributed.world_size()))
            mine[: stop - start] = whole.view(-1)[start:stop]
            whole.view(-1).copy_(distributed.all_gather(mine)[: whole.numel()])
        redistribute(engine)


def _wholes(engine: Engine) -> Iterator[Tensor]:
    """Yields the tensors that each rank holds whole, although it stores only a shard of each.

    These are the running statistics and their averages, and at stage 0 also weights, moments and
    the average of the weights.
    """
    yield from _statistics(engine).values()
    yield from engine.averages.values()
    if engine.stage == 0:
        inner = engine.gate.inner
        for parameter in engine.task.parameters():
            state = inner.state[parameter]
            kinds = [kind for kind in (*kept_by(inner).moments, EMA) if kind in state]
            yield from (parameter.data, *(state[kind] for kind in kinds))


def _own_span(whole: Tensor) -> Span:
    """Returns the range of elements of a whole tensor that this rank stores in a checkpoint."""
    return EachTensor({"": whole.numel()}, distributed.world_size()).span(distributed.rank(), "")


def redistribute(engine: Engine) -> None:
    """Copies the masters into the parameters that forward uses; all ranks must call it."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage in (1, 2):
        optimizer.update_lp_params()
    elif engine.stage == 3:
        _forget_whole_copies(engine)
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.invalidate_secondary_tensor()


def _forget_whole_copies(engine: Engine) -> None:
    """Drops the whole copies of small tensors under ZeRO-3; the next forward gathers them again."""
    if engine.stage == 3:
        engine.deepspeed.optimizer._partition_all_parameters()


def _home(engine: Engine, parameter: nn.Parameter, *, whole: bool = False) -> _Home | None:
    optimizer = engine.deepspeed.optimizer
    if engine.stage == 0:
        # Every rank has all of it and stores its shard.
        span = Span(0, parameter.numel()) if whole else _own_span(parameter)
        master = parameter.data.view(-1)[span.start : span.stop]
        return _Home(span, master, parameter, span.start)
    if engine.stage == 3:
        group, offset, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        owner = optimizer.fp32_partitioned_groups_flat[group]
        elements, start = partition.shard(parameter)
        length = elements.numel()
        master = owner.data.narrow(0, offset, length)
        return _Home(Span(start, start + length), master, owner, offset)
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
    owner = _flat_partitions(optimizer)[mapping.param_group_index]
    offset = mapping.hp_fragment_address.start
    return _Home(Span(start, start + length), owner.data.narrow(0, offset, length), owner, offset)


def _flat_partitions(optimizer: Any) -> list[Tensor]:
    flats = getattr(optimizer, "single_partition_of_fp32_groups", None)
    return flats if flats is not None else optimizer.fp32_groups_flat_partition


def optimizer_state(inner: torch.optim.Optimizer, owner: Tensor) -> dict[str, Any]:
    """Returns the state {name: moment or step count} that the optimiser `inner` keeps of a tensor.

    If it does not exist yet, as before the first step, it is made with its initial values. `inner`
    is an optimiser of `make_optimizer`, and `owner` a tensor that it steps.
    """
    owner_state, state_fields = inner.state[owner], kept_by(inner)
    if state_fields.count is not None and "step" not in owner_state:
        owner_state["step"] = state_fields.count(owner, 0)
    for moment, value in state_fields.moments.items():
        if moment not in owner_state:
            owner_state[moment] = torch.full_like(owner, value, requires_grad=False)
    return owner_state


def _part(moment: Tensor, home: _Home) -> Tensor:
    return moment.view(-1).narrow(0, home.offset, home.master.numel())


def _set_steps(inner: torch.optim.Optimizer, owner: Tensor, steps: int) -> None:
    if (count := kept_by(inner).count) is not None:
        inner.state[owner]["step"] = count(owner, steps)


def _numel(parameter: nn.Parameter) -> int:
    return parameter.ds_numel if partition.is_partitioned(parameter) else parameter.numel()

"""Gradients from backward to the optimiser, in fewer passes than DeepSpeed 0.19.8 makes.

What it does is replaced by methods on the objects of one engine; the numbers stay the same.

| stage        | DeepSpeed                                   | here                               |
|--------------|---------------------------------------------|------------------------------------|
| 0            | one rank: flattens, reduces, copies back    | leaves the gradients where they are|
|              | flattens and reduces after backward, and    | copies each gradient into a bucket |
|              | copies back                                 | and reduces beside backward        |
|              | clips by a norm that it keeps to itself     | one norm, for clipping and the log |
| 2, and 1 in  | copies gradients into buckets that are new  | copies them into buckets that stay,|
| float32      | with every step, all-reduces these, copies  | or where the optimiser reads them; |
|              | the rank's shard out of them, and joins it  | on few ranks (`MOST_OWNERS`) sends |
|              | norm from float64 copies                    | each to the one that steps it      |
| 1, bfloat16  | adds float32 copies to zeros, zeroes twice  | writes the first micro batch       |
|              | all-reduces a float32 copy of all gradients | sums them in place, by buckets,    |
|              | after backward                              | beside backward, as above          |
|              | norm and clipping of all, on every rank     | of the rank's shard                |
| 3            | gathers each tensor that stays whole by     | the next forward pass gathers them |
|              | itself after a step                         | with their neighbours              |

All else goes DeepSpeed's own way, beside backward too: stage 3, and stages 1 and 2 with the
optimiser in host memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fd_large import distributed
from fd_large.engine.zero.private_names import get, replace
from fd_large.engine.zero.start import deepspeed
from fd_large.plan.buckets import MOST_OWNERS

_STAGE_1_2 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"

# Buckets that are on their way at a time in memory of their own.
_MOST_COPIES = 2
# Elements whose squares are summed at a time.
_NORM_CHUNK = 1 << 16


def spare_passes(engine: Any, *, bucket: int) -> Sequence[Tensor]:
    """Replaces DeepSpeed's reduction and clipping where the table above says so.

    Args:
        engine: DeepSpeed's engine, before its first forward.
        bucket: Number of elements that are reduced together.

    Returns: what stays in memory and holds gradients.
    """
    if isinstance(engine.optimizer, get("deepspeed.runtime.bf16_optimizer:BF16_Optimizer")):
        return _Float32Sums(engine, bucket).kept
    if isinstance(engine.optimizer, get(_STAGE_1_2)):
        return [] if engine.optimizer.cpu_offload else _Shards(engine, bucket).kept
    if engine.zero_optimization_stage() == 0:
        return _WholeGradients(engine, bucket).kept
    # After a step DeepSpeed would gather the small tensors that stay whole in a message each,
    # and wait for the device. The next forward pass gathers them with their neighbours.
    replace(engine.optimizer, "persistent_parameters", [])
    return [engine.optimizer.grad_partitions_flat_buffer]


def _cuts(size: int, bucket: int) -> list[tuple[int, int, int | None]]:
    """Cuts a flat group of gradients into (begin, end, owner); None: several ranks step it."""
    world = distributed.world_size()
    if world > MOST_OWNERS:
        return [(begin, min(begin + bucket, size), None) for begin in range(0, size, bucket)]
    shard = size // world
    return [
        (owner * shard + start, owner * shard + min(start + bucket, shard), owner)
        for owner in range(world)
        for start in range(0, shard, bucket)
    ]


def _summed(sent: Tensor, owner: int | None) -> Any:
    """Starts a sum over ranks in place, on its owner or, where there is none, on all."""
    if owner is None:
        return deepspeed.comm.all_reduce(sent, async_op=True)
    return deepspeed.comm.reduce(sent, owner, async_op=True)


class _InOrder(ABC):
    """Sends buckets of gradients: in one order on all ranks, each once it is complete.

    Args:
        needs: How many gradients each bucket waits for, in the order in which they are sent.
    """

    def __init__(self, needs: Sequence[int]) -> None:
        self._needs = needs
        # What was sent and not waited for, the oldest first.
        self._works: list[tuple[Any, ...]] = []
        self._begin()

    def _begin(self) -> None:
        self._missing, self._next = list(self._needs), 0

    def arrived(self, bucket: int) -> None:
        """Tells that one of a bucket's gradients is there."""
        assert bucket >= self._next, "a gradient came after its bucket was sent"
        self._missing[bucket] -= 1
        while self._next < len(self._needs) and self._missing[self._next] == 0:
            self._start(self._next)
            self._next += 1

    def finish(self) -> None:
        """Sends the rest as it is, waits for all, and begins anew."""
        for bucket in range(self._next, len(self._needs)):
            self._start(bucket)
        while self._works:
            self._settle()
        self._begin()

    @abstractmethod
    def _start(self, bucket: int) -> None:
        """Sends a bucket."""

    @abstractmethod
    def _settle(self) -> None:
        """Waits for the oldest of what was sent."""


class _Reductions(_InOrder):
    """Sums over ranks, in place.

    Args:
        engine: DeepSpeed's engine, which knows the data type that is sent.
        buckets: What is summed.
        needs: How many gradients each bucket waits for.
        owners: The rank that needs the sum of each bucket; None: all need it. On the others it
            holds nothing of use afterwards.
    """

    def __init__(
        self,
        engine: Any,
        buckets: Sequence[Tensor],
        needs: Sequence[int],
        owners: Sequence[int | None],
    ) -> None:
        super().__init__(needs)
        self._engine, self._buckets, self._owners = engine, buckets, owners

    def _start(self, bucket: int) -> None:
        if distributed.world_size() == 1:
            return
        own = self._buckets[bucket]
        dtype = self._engine.communication_data_type
        if own.dtype != dtype and len(self._works) == _MOST_COPIES:
            self._settle()
        sent = own.to(dtype)
        owner = self._owners[bucket]
        self._works.append((_summed(sent, owner), sent, own, owner))

    def _settle(self) -> None:
        work, sent, own, owner = self._works.pop(0)
        work.wait()
        if sent is not own and owner in (None, distributed.rank()):
            own.copy_(sent)


class _WholeGradients:
    """Stage 0: every rank holds and steps everything."""

    def __init__(self, engine: Any, bucket: int) -> None:
        self._engine = engine
        self.kept: list[Tensor] = []
        if distributed.world_size() > 1:
            averages = _Averages(engine, bucket)
            self.kept = averages.kept
            replace(engine, "buffered_allreduce_fallback", averages.finish)
        else:
            replace(engine, "buffered_allreduce_fallback", lambda *_, **__: None)
        replace(engine, "clip_fp32_gradients", lambda: None)
        self._take_step = replace(engine, "_take_model_step", self._step)

    def _step(self, lr_kwargs: Any) -> None:
        engine = self._engine
        parameters = [p for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if engine.gradient_clipping() > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, engine.gradient_clipping(), norm)
        # DeepSpeed's other optimisers keep the norm before clipping here.
        engine.optimizer._global_grad_norm = norm
        self._take_step(lr_kwargs)


class _Averages:
    """Means of gradients over ranks, in buckets that are reduced while backward goes on.

    A bucket holds neighbours, and the last layers' come first, as their gradients do. Buckets stay
    in memory; from backward to the step, gradients are views of them.
    """

    def __init__(self, engine: Any, bucket: int) -> None:
        self._engine = engine
        rows: list[list[nn.Parameter]] = []
        left = 0
        for parameter in reversed([p for p in engine.module.parameters() if p.requires_grad]):
            if parameter.numel() > left:
                rows.append([])
                left = max(bucket, parameter.numel())
            left -= parameter.numel()
            rows[-1].append(parameter)
        flats = [row[0].new_zeros(sum(p.numel() for p in row)) for row in rows]
        self.kept = flats
        self._views: dict[nn.Parameter, Tensor] = {}
        needs = [len(row) for row in rows]
        self._reductions = _Reductions(engine, flats, needs, [None] * len(rows))
        for number, (row, flat) in enumerate(zip(rows, flats, strict=True)):
            parts = flat.split([p.numel() for p in row])
            for parameter, part in zip(row, parts, strict=True):
                self._views[parameter] = part.view_as(parameter)
                parameter.register_post_accumulate_grad_hook(partial(self._take, number))

    def _take(self, bucket: int, parameter: nn.Parameter) -> None:
        if self._engine.is_gradient_accumulation_boundary():
            self._fill(parameter)
            self._reductions.arrived(bucket)

    @torch.no_grad()
    def _fill(self, parameter: nn.Parameter) -> None:
        view = self._views[parameter]
        assert parameter.grad is not view, "a gradient came after its bucket was filled"
        if parameter.grad is None:
            # It took no part on this rank, but may have on others.
            view.zero_()
        else:
            torch.div(parameter.grad, distributed.world_size(), out=view)
        parameter.grad = view

    def finish(self, grads: Any = None, elements_per_buffer: int = 0) -> None:
        """Reduces, once backward is over, what is left, and waits for all."""
        for parameter, view in self._views.items():
            if parameter.grad is not view:
                self._fill(parameter)
        self._reductions.finish()


class _Float32Sums:
    """Stage 1 in bfloat16: every rank sums all its gradients in float32, and steps its shard."""

    def __init__(self, engine: Any, bucket: int) -> None:
        self._engine, self._optimizer = engine, engine.optimizer
        self.kept = engine.optimizer.fp32_groups_gradients_flat
        replace(engine, "buffered_allreduce_fallback", self._reduce)
        replace(engine.optimizer, "_update_hp_grad", self._add)
        replace(engine.optimizer, "clear_hp_grads", self._begin)
        replace(engine.optimizer, "get_grads_for_norm", self._for_norm)
        self._reductions = self._cut(bucket)

    def _cut(self, bucket: int) -> _Reductions:
        """Cuts the sums into buckets, in about the order in which backward completes them."""
        cut = []
        self._buckets_of: dict[tuple[int, int], list[int]] = {}
        for group, flat in enumerate(self._optimizer.fp32_groups_gradients_flat):
            for begin, end, owner in _cuts(flat.numel(), bucket):
                # Backward comes to a group's last parameters first.
                cut.append((-begin / flat.numel(), group, begin, owner, flat[begin:end]))
        cut.sort(key=lambda one: one[:3])
        needs = [0] * len(cut)
        for group, totals in enumerate(self._optimizer.fp32_groups_gradients):
            begin = 0
            for index, total in enumerate(totals):
                end = begin + total.numel()
                mine = [
                    number
                    for number, (_, of, start, _, part) in enumerate(cut)
                    if of == group and start < end and begin < start + part.numel()
                ]
                for number in mine:
                    needs[number] += 1
                self._buckets_of[group, index] = mine
                begin = end
        *_, owners, parts = zip(*cut, strict=True)
        return _Reductions(self._engine, parts, needs, owners)

    @torch.no_grad()
    def _add(self, parameter: Any, group: int, index: int, clear_lp_grads: bool) -> None:
        """Adds a parameter's gradient of one micro batch to its sum."""
        optimizer = self._optimizer
        if parameter.grad is None:
            return
        total = optimizer.fp32_groups_gradients[group][index]
        gradient = parameter.grad.view(total.shape)
        if optimizer.fp32_groups_has_gradients[group][index]:
            total.add_(gradient)
        else:
            total.copy_(gradient)
        optimizer.fp32_groups_has_gradients[group][index] = True
        if clear_lp_grads:
            parameter.grad.zero_()
        if self._engine.is_gradient_accumulation_boundary():
            for number in self._buckets_of[group, index]:
                self._reductions.arrived(number)

    def _begin(self) -> None:
        """Marks all sums as empty: the next gradients overwrite them, so they need no zeroing."""
        for has in self._optimizer.fp32_groups_has_gradients:
            has[:] = [False] * len(has)

    @torch.no_grad()
    def _reduce(self, grads: Any = None, elements_per_buffer: int = 0) -> None:
        """Takes the mean over ranks, in the communication data type, of what is left of it."""
        optimizer = self._optimizer
        for totals, has in zip(
            optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True
        ):
            for total, present in zip(totals, has, strict=True):
                if not present:
                    total.zero_()
        self._reductions.finish()
        if distributed.world_size() > 1:
            for shard in optimizer.fp32_groups_gradient_flat_partition:
                shard.div_(distributed.world_size())

    def _for_norm(self, for_clipping: bool = False) -> Any:
        """What DeepSpeed clips: the shards; what it takes the norm of: the norm itself, alone."""
        shards = self._optimizer.fp32_groups_gradient_flat_partition
        return shards if for_clipping else ([_norm(shards)], {})


class _Bucket(NamedTuple):
    """Neighbours in a flat group of parameters.

    Attributes:
        group: Number of the group.
        begin: First element in the group.
        size: Number of elements.
        owner: The rank that steps all of it; None: each rank steps a part.
        parts: (parameter, its first element here, behind its last, place in the bucket).
    """

    group: int
    begin: int
    size: int
    owner: int | None
    parts: list[tuple[nn.Parameter, int, int, int]]


class _Partition(list):
    """The gradients of one group that this rank steps: a flat tensor, which DeepSpeed looks for."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__([flat])
        self.flat_partition = flat


class _Shards(_InOrder):
    """Stage 2, and 1 in float32: every rank keeps the sums of what it steps.

    A bucket is filled in memory that is used again for the next but one; in float32 its owner fills
    it where the optimiser reads it. A gradient is freed once it is in its buckets. Micro batches of
    a step are summed in float32: at stage 2 in the shard, at stage 1 where autograd does.
    """

    def __init__(self, engine: Any, bucket: int) -> None:
        self._engine, self._optimizer = engine, engine.optimizer
        self._rank, self._world = distributed.rank(), distributed.world_size()
        self._buckets = self._cut(bucket)
        super().__init__([len(one.parts) for one in self._buckets])
        self._buckets_of: dict[nn.Parameter, list[int]] = {}
        for number, one in enumerate(self._buckets):
            for parameter, *_ in one.parts:
                self._buckets_of.setdefault(parameter, []).append(number)
        groups, sizes = self._optimizer.bit16_groups, self._optimizer.partition_size
        self._shards = [
            torch.zeros(size, device=group[0].device)
            for group, size in zip(groups, sizes, strict=True)
        ]
        # As `plan/memory.py` counts them, and at least the largest bucket.
        total = sum(parameter.numel() for group in groups for parameter in group)
        share = total if self._world > MOST_OWNERS else -(-total // self._world)
        size = max(min(bucket, share), *(one.size for one in self._buckets))
        sent = engine.communication_data_type
        self._spare = [self._shards[0].new_empty(size, dtype=sent) for _ in range(_MOST_COPIES)]
        self.kept = [*self._shards, *self._spare]
        self._first = True
        self._at_boundary_only = engine.zero_optimization_stage() == 1
        replace(self._optimizer, "process_gradients", self._take)
        replace(self._optimizer, "reduce_gradients", self._reduce)
        replace(self._optimizer, "overlapping_partition_gradients_reduce_epilogue", self._reduce)
        replace(self._optimizer, "scaled_global_norm", self._norm)

    def _cut(self, bucket: int) -> list[_Bucket]:
        """Cuts the groups into buckets, in about the order in which backward completes them."""
        cut = []
        for group, parameters in enumerate(self._optimizer.bit16_groups):
            size = self._optimizer.partition_size[group] * self._world
            first = self._optimizer.bit16_groups_flat[group].storage_offset()
            for begin, end, owner in _cuts(size, bucket):
                parts = []
                for parameter in parameters:
                    # DeepSpeed makes each parameter a view of its group.
                    place = parameter.data.storage_offset() - first
                    low, high = max(begin, place), min(end, place + parameter.numel())
                    if low < high:
                        parts.append((parameter, low - place, high - place, low - begin))
                if parts:
                    # Without the elements behind the last parameter, which pad the group.
                    _, low, high, place = parts[-1]
                    one = _Bucket(group, begin, place + high - low, owner, parts)
                    # Backward comes to a group's last parameters first.
                    cut.append((-begin / size, group, one))
        return [one for *_, one in sorted(cut, key=lambda one: one[:2])]

    def _take(self, parameter: nn.Parameter, group: int) -> None:
        """A gradient of a micro batch is there."""
        if not self._at_boundary_only or self._engine.is_gradient_accumulation_boundary():
            for number in self._buckets_of[parameter]:
                self.arrived(number)

    @torch.no_grad()
    def _start(self, bucket: int) -> None:
        one = self._buckets[bucket]
        if len(self._works) == _MOST_COPIES:
            self._settle()
        filled = self._spare[bucket % _MOST_COPIES][: one.size]
        mine, place = self._own(one)
        if one.owner == self._rank and self._first and mine.dtype == filled.dtype:
            filled = mine
        for parameter, low, high, start in one.parts:
            view = filled[start : start + high - low]
            if parameter.grad is None:
                # It took no part on this rank, but may have on others.
                view.zero_()
            else:
                view.copy_(parameter.grad.reshape(-1)[low:high])
            if bucket == self._buckets_of[parameter][-1]:
                parameter.grad = None
        work = _summed(filled, one.owner)
        self._works.append((work, filled[place : place + mine.numel()], mine))

    def _own(self, one: _Bucket) -> tuple[Tensor, int]:
        """Returns what this rank keeps of a bucket, a view of its shard, and where it begins."""
        shard = self._shards[one.group]
        begin = one.begin - self._rank * shard.numel()
        low, high = max(begin, 0), min(begin + one.size, shard.numel())
        return shard[low : max(low, high)], max(0, low - begin)

    @torch.no_grad()
    def _settle(self) -> None:
        work, summed, mine = self._works.pop(0)
        work.wait()
        if not self._first:
            mine.add_(summed, alpha=1 / self._world)
            return
        if summed.data_ptr() != mine.data_ptr():
            mine.copy_(summed)
        mine.mul_(1 / self._world)

    def _reduce(self, pipeline_parallel: bool = False) -> None:
        """Sums, once backward is over, what is left, and hands the sums to the optimiser."""
        self.finish()
        self._first = self._engine.is_gradient_accumulation_boundary()
        if self._first:
            self._optimizer.averaged_gradients.update(enumerate(map(_Partition, self._shards)))

    def _norm(self, norm_type: float = 2) -> Tensor:
        return _norm(self._shards)


def _norm(shards: Sequence[Tensor]) -> Tensor:
    """Returns the norm of the shards of all ranks, float32; a collective.

    In chunks, whose float32 sums are exact to about 1e-7; DeepSpeed makes float64 copies.
    """
    chunks = [chunk for shard in shards for chunk in shard.split(_NORM_CHUNK)]
    square = torch.nn.utils.get_total_norm(chunks).double().square()
    return distributed.sum_tensor(square).sqrt().float()

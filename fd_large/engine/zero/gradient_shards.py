"""ZeRO stage 2, and stage 1 in float32: every rank keeps the gradient sums of its shard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fd_large.engine.zero.gradient_buckets import (
    MOST_COPIES,
    InOrder,
    cuts,
    start_sum,
    sums_have_owners,
)
from fd_large.engine.zero.private_names import replace
from fd_large.ranks import distributed

# Elements whose squares are summed at a time.
_NORM_CHUNK = 1 << 16


class _Bucket(NamedTuple):
    """Adjacent elements of a flattened parameter group, whose gradients are reduced together.

    Attributes:
        group: Number of the parameter group.
        begin: Position of the bucket's first element in the flattened group.
        size: Number of elements.
        owner: The rank that steps the whole bucket, or None if each rank steps a part.
        parts: (parameter, start, stop, position) of each parameter with elements in the bucket:
            elements [start, stop) of the flattened parameter begin at `position` in the bucket.
    """

    group: int
    begin: int
    size: int
    owner: int | None
    parts: list[tuple[nn.Parameter, int, int, int]]


class _Partition(list):
    """List whose only entry is this rank's flat gradients of a group, as is its `flat_partition`.

    DeepSpeed reads either of them.
    """

    def __init__(self, flat: Tensor) -> None:
        super().__init__([flat])
        self.flat_partition = flat


class OwnedShards(InOrder):
    """Reduces gradients at ZeRO stage 2, and at stage 1 in float32; each rank keeps its shard.

    Two bucket buffers are used in turn. If gradients are sent in float32, the rank that owns a
    bucket fills it directly in its shard, where the optimiser reads it. A gradient is freed when
    its elements are in buckets. The micro batches of a step are summed in float32: at stage 2 in
    the shard, at stage 1 where autograd accumulates gradients.

    If the parameters are float32, the optimiser steps the parameters' own memory, whereas DeepSpeed
    would step a copy and copy it back.

    Args:
        engine: DeepSpeed's engine, whose optimiser's methods are replaced.
        bucket_size: Number of elements that are reduced together.

    Attributes:
        kept: Tensors that hold gradients, and stay in memory from step to step.
    """

    def __init__(self, engine: Any, bucket_size: int) -> None:
        self._engine, self._optimizer = engine, engine.optimizer
        self._rank, self._world = distributed.rank(), distributed.world_size()
        self._buckets = self._cut(bucket_size)
        super().__init__([len(bucket.parts) for bucket in self._buckets])
        # By id, since hashing a tensor calls a Python function.
        self._buckets_of: dict[int, list[int]] = {}
        for number, bucket in enumerate(self._buckets):
            for parameter, *_ in bucket.parts:
                self._buckets_of.setdefault(id(parameter), []).append(number)
        # Views for the gradients of a bucket, by its number and whether they are in the shard.
        self._views: dict[tuple[int, bool], list[Tensor]] = {}
        groups, sizes = self._optimizer.bit16_groups, self._optimizer.partition_size
        self._shards = [
            torch.zeros(size, device=group[0].device)
            for group, size in zip(groups, sizes, strict=True)
        ]
        # As `plan/memory.py` counts them, and at least the largest bucket.
        total = sum(parameter.numel() for group in groups for parameter in group)
        share = -(-total // self._world) if sums_have_owners() else total
        size = max(min(bucket_size, share), *(bucket.size for bucket in self._buckets))
        sent = engine.communication_data_type
        self._spare = [self._shards[0].new_empty(size, dtype=sent) for _ in range(MOST_COPIES)]
        self.kept = [*self._shards, *self._spare]
        self._first = True
        self._at_boundary_only = engine.zero_optimization_stage() == 1
        replace(self._optimizer, "process_gradients", self._take)
        replace(self._optimizer, "reduce_gradients", self._reduce)
        replace(self._optimizer, "overlapping_partition_gradients_reduce_epilogue", self._reduce)
        replace(self._optimizer, "scaled_global_norm", self._norm)
        self._step_in_place()

    def _step_in_place(self) -> None:
        """Makes float32 masters views of the parameters, which then need no update after a step."""
        optimizer = self._optimizer
        groups = optimizer.parallel_partitioned_bit16_groups
        for shards, master in zip(groups, optimizer.single_partition_of_fp32_groups, strict=True):
            if shards[self._rank].dtype == master.dtype:
                master.data = shards[self._rank].data
        optimizer._link_all_hp_params()  # Otherwise its links to the old masters would stay.
        # After a step DeepSpeed makes each parameter a view of its group, which it is already.
        replace(optimizer, "_update_model_bit16_weights", lambda group_index: None)

    def _cut(self, bucket_size: int) -> list[_Bucket]:
        """Cuts the gradients into buckets, roughly in the order in which backward fills them."""
        cut = []
        for group, parameters in enumerate(self._optimizer.bit16_groups):
            size = self._optimizer.partition_size[group] * self._world
            first = self._optimizer.bit16_groups_flat[group].storage_offset()
            for begin, end, owner in cuts(size, bucket_size):
                parts = []
                for parameter in parameters:
                    # DeepSpeed makes each parameter a view of its group.
                    place = parameter.data.storage_offset() - first
                    low, high = max(begin, place), min(end, place + parameter.numel())
                    if low < high:
                        parts.append((parameter, low - place, high - place, low - begin))
                if parts:
                    # Without the padding behind the group's last parameter.
                    _, low, high, place = parts[-1]
                    bucket = _Bucket(group, begin, place + high - low, owner, parts)
                    # Backward comes to a group's last parameters first.
                    cut.append((-begin / size, group, bucket))
        return [bucket for *_, bucket in sorted(cut, key=lambda row: row[:2])]

    def _take(self, parameter: nn.Parameter, group: int) -> None:
        """Counts the gradient of `parameter` as complete in each bucket with a part of it.

        Replaces DeepSpeed's `process_gradients`, whose argument `group` is ignored. At stage 1,
        where autograd accumulates gradients, only those of a step's last micro batch are counted.
        """
        if not self._at_boundary_only or self._engine.is_gradient_accumulation_boundary():
            for number in self._buckets_of[id(parameter)]:
                self.arrived(number)

    @torch.no_grad()
    def _start(self, number: int) -> None:
        bucket = self._buckets[number]
        if len(self._works) == MOST_COPIES:
            self._settle()
        filled = self._spare[number % MOST_COPIES][: bucket.size]
        mine, place = self._own(bucket)
        in_shard = bucket.owner == self._rank and self._first and mine.dtype == filled.dtype
        if in_shard:
            filled = mine
        if (number, in_shard) not in self._views:
            self._views[number, in_shard] = _views(filled, bucket)
        views, gradients = [], []
        parts = zip(self._views[number, in_shard], bucket.parts, strict=True)
        for view, (parameter, low, high, _) in parts:
            gradient = parameter.grad
            if gradient is None:
                # The parameter has no gradient on this rank, but may have one on others.
                view.zero_()
                continue
            if view.shape != gradient.shape:
                gradient = gradient.reshape(-1)[low:high]
            views.append(view)
            gradients.append(gradient)
            if number == self._buckets_of[id(parameter)][-1]:
                parameter.grad = None
        if views:
            torch._foreach_copy_(views, gradients)
        work = start_sum(filled, bucket.owner)
        self._works.append((work, filled[place : place + mine.numel()], mine))

    def _own(self, bucket: _Bucket) -> tuple[Tensor, int]:
        """Returns a view of the part of a bucket in this rank's shard, and its place in the bucket.

        The view is empty if the shard has no part of the bucket.
        """
        shard = self._shards[bucket.group]
        begin = bucket.begin - self._rank * shard.numel()
        low, high = max(begin, 0), min(begin + bucket.size, shard.numel())
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
        """Sums the remaining buckets after the backward of a micro batch.

        After the last micro batch of a step, the summed shards are passed to the optimiser.
        Replaces methods of DeepSpeed, whose argument is ignored.
        """
        self.finish()
        self._first = self._engine.is_gradient_accumulation_boundary()
        if self._first:
            self._optimizer.averaged_gradients.update(enumerate(map(_Partition, self._shards)))

    def _norm(self, norm_type: float = 2) -> Tensor:
        return norm_of_shards(self._shards)


def _views(filled: Tensor, bucket: _Bucket) -> list[Tensor]:
    """Returns a view of a bucket's memory `filled` for each parameter in the bucket.

    The view has the parameter's shape, or is flat if the bucket has only a part of the parameter.
    """
    views = []
    for parameter, low, high, start in bucket.parts:
        view = filled[start : start + high - low]
        views.append(view.view(parameter.shape) if high - low == parameter.numel() else view)
    return views


def norm_of_shards(shards: Sequence[Tensor]) -> Tensor:
    """Returns the L2 norm of the shards of all ranks, a float32 scalar; all ranks must call it.

    Squares are summed by chunks, whose float32 sums are exact to about 1e-7, whereas DeepSpeed
    makes float64 copies.
    """
    chunks = [chunk for shard in shards for chunk in shard.split(_NORM_CHUNK)]
    square = torch.nn.utils.get_total_norm(chunks).double().square()
    return distributed.sum_tensor(square).sqrt().float()

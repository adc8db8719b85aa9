"""ZeRO stage 1 in bfloat16: every rank sums all its gradients in float32, and steps its shard."""

from __future__ import annotations

from typing import Any

import torch

from fd_large.engine.zero.gradient_buckets import Reductions, cuts
from fd_large.engine.zero.gradient_shards import norm_of_shards
from fd_large.engine.zero.private_names import replace
from fd_large.ranks import distributed


class Float32Sums:
    """Averages gradients over the ranks in training with bfloat16 at ZeRO stage 1.

    Every rank first sums all gradients of its micro batches in float32.

    Args:
        engine: DeepSpeed's engine, whose methods are replaced.
        bucket: Number of elements that are reduced together.

    Attributes:
        kept: Tensors that hold the sums, and stay in memory from step to step.
    """

    def __init__(self, engine: Any, bucket: int) -> None:
        self._engine, self._optimizer = engine, engine.optimizer
        self.kept = engine.optimizer.fp32_groups_gradients_flat
        replace(engine, "buffered_allreduce_fallback", self._reduce)
        replace(engine.optimizer, "_update_hp_grad", self._add)
        replace(engine.optimizer, "clear_hp_grads", self._begin)
        replace(engine.optimizer, "get_grads_for_norm", self._for_norm)
        self._reductions = self._cut(bucket)

    def _cut(self, bucket: int) -> Reductions:
        """Cuts the sums into buckets, about in the order in which backward completes the sums.

        Returns the object that sums the buckets over the ranks.
        """
        cut = []
        self._buckets_of: dict[tuple[int, int], list[int]] = {}
        for group, flat in enumerate(self._optimizer.fp32_groups_gradients_flat):
            for begin, end, owner in cuts(flat.numel(), bucket):
                # Backward comes to a group's last parameters first.
                cut.append((-begin / flat.numel(), group, begin, owner, flat[begin:end]))
        cut.sort(key=lambda row: row[:3])
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
        return Reductions(self._engine, parts, needs, owners)

    @torch.no_grad()
    def _add(self, parameter: Any, group: int, index: int, clear_lp_grads: bool) -> None:
        """Adds a parameter's gradient of one micro batch, if it has one, to its float32 sum.

        Replaces DeepSpeed's `_update_hp_grad`. In the last micro batch of a step, the sum then
        counts as complete in its buckets. The parameter has number `index` in its `group`;
        `clear_lp_grads` sets the gradient to zero afterwards.
        """
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
        """Marks all sums as empty, so that the next gradients overwrite the sums."""
        for has in self._optimizer.fp32_groups_has_gradients:
            has[:] = [False] * len(has)

    @torch.no_grad()
    def _reduce(self, grads: Any = None, elements_per_buffer: int = 0) -> None:
        """Sums the remaining buckets over the ranks; divides this rank's shard by the world size.

        Replaces DeepSpeed's `buffered_allreduce_fallback`, whose arguments are ignored.
        """
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
        """Returns this rank's shards for clipping, or else ([L2 norm of all ranks' shards], {}).

        Replaces DeepSpeed's `get_grads_for_norm`.
        """
        shards = self._optimizer.fp32_groups_gradient_flat_partition
        return shards if for_clipping else ([norm_of_shards(shards)], {})

"""Gradients from backward to the optimiser, in fewer passes than DeepSpeed 0.19.8 makes.

What it does is replaced by methods on the objects of one engine; the numbers stay the same.

| stage        | DeepSpeed                                   | here                               |
|--------------|---------------------------------------------|------------------------------------|
| 0            | one rank: flattens, reduces, copies back    | leaves the gradients where they are|
|              | flattens and reduces after backward, and    | copies each gradient into a bucket |
|              | copies back                                 | and reduces beside backward        |
|              | clips by a norm that it keeps to itself     | one norm, for clipping and the log |
| 1, bfloat16  | adds float32 copies to zeros, zeroes twice  | writes the first micro batch       |
|              | reduces a float32 copy of all gradients     | reduces them in place, by buckets, |
|              | after backward                              | beside backward                    |
|              | clips all gradients on every rank           | clips the rank's shard             |
| 3            | gathers each tensor that stays whole by     | the next forward pass gathers them |
|              | itself after a step                         | with their neighbours              |

Gradients of stage 1 in float32 and of stages 2 and 3 go DeepSpeed's own way, beside backward too.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fd_large import distributed
from fd_large.engine.zero.private_names import get, replace
from fd_large.engine.zero.start import deepspeed

# Buckets that are on their way at a time as copies in the data type that is sent.
_MOST_COPIES = 2


def spare_passes(engine: Any, *, bucket: int) -> None:
    """Replaces DeepSpeed's reduction and clipping where the table above says so.

    Args:
        engine: DeepSpeed's engine, before its first forward.
        bucket: Number of elements that are reduced together.
    """
    if isinstance(engine.optimizer, get("deepspeed.runtime.bf16_optimizer:BF16_Optimizer")):
        _Float32Sums(engine, bucket)
    elif engine.zero_optimization_stage() == 0:
        _WholeGradients(engine, bucket)
    elif engine.zero_optimization_stage() == 3:
        # After a step DeepSpeed would gather the small tensors that stay whole in a message each,
        # and wait for the device. The next forward pass gathers them with their neighbours.
        replace(engine.optimizer, "persistent_parameters", [])


class _Reductions:
    """Sums over ranks, bucket by bucket: in one order on all ranks, each once it is complete.

    Args:
        engine: DeepSpeed's engine, which knows the data type that is sent.
        buckets: What is summed, in place and in this order.
        needs: How many gradients each bucket waits for.
        group: The ranks; None for all.
    """

    def __init__(
        self, engine: Any, buckets: Sequence[Tensor], needs: Sequence[int], group: Any = None
    ) -> None:
        self._engine, self._buckets, self._needs, self._group = engine, buckets, needs, group
        self._works: list[tuple[Any, Tensor, Tensor]] = []
        self._begin()

    def _begin(self) -> None:
        self._missing, self._next = list(self._needs), 0

    def arrived(self, bucket: int) -> None:
        """Tells that one of a bucket's gradients is in it."""
        assert bucket >= self._next, "a gradient came after its bucket was sent"
        self._missing[bucket] -= 1
        while self._next < len(self._buckets) and self._missing[self._next] == 0:
            self._start(self._next)
            self._next += 1

    def finish(self) -> None:
        """Sums the rest as it is, waits for all, and begins anew."""
        for bucket in range(self._next, len(self._buckets)):
            self._start(bucket)
        while self._works:
            self._settle()
        self._begin()

    def _start(self, bucket: int) -> None:
        if distributed.world_size() == 1:
            return
        own = self._buckets[bucket]
        dtype = self._engine.communication_data_type
        if own.dtype != dtype and len(self._works) == _MOST_COPIES:
            self._settle()
        sent = own.to(dtype)
        work = deepspeed.comm.all_reduce(sent, group=self._group, async_op=True)
        self._works.append((work, sent, own))

    def _settle(self) -> None:
        work, sent, own = self._works.pop(0)
        work.wait()
        if sent is not own:
            own.copy_(sent)


class _WholeGradients:
    """Stage 0: every rank holds and steps everything."""

    def __init__(self, engine: Any, bucket: int) -> None:
        self._engine = engine
        if distributed.world_size() > 1:
            replace(engine, "buffered_allreduce_fallback", _Averages(engine, bucket).finish)
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
        self._views: dict[nn.Parameter, Tensor] = {}
        self._reductions = _Reductions(engine, flats, [len(row) for row in rows])
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
    """Stage 1 in bfloat16: every rank sums all gradients in float32, and steps its shard."""

    def __init__(self, engine: Any, bucket: int) -> None:
        self._engine, self._optimizer = engine, engine.optimizer
        replace(engine, "buffered_allreduce_fallback", self._reduce)
        replace(engine.optimizer, "_update_hp_grad", self._add)
        replace(engine.optimizer, "clear_hp_grads", self._begin)
        self._grads_for_norm = replace(engine.optimizer, "get_grads_for_norm", self._for_norm)
        self._reductions = self._cut(bucket)

    def _cut(self, bucket: int) -> _Reductions:
        """Cuts the sums into buckets, in about the order in which backward completes them."""
        cut = []
        self._buckets_of: dict[tuple[int, int], list[int]] = {}
        for group, flat in enumerate(self._optimizer.fp32_groups_gradients_flat):
            totals = self._optimizer.fp32_groups_gradients[group]
            length = sum(total.numel() for total in totals)
            for start, part in zip(range(0, flat.numel(), bucket), flat.split(bucket), strict=True):
                # Backward comes to a group's last parameters first.
                cut.append((-start / length, group, start, part))
        cut.sort(key=lambda one: one[:3])
        needs = [0] * len(cut)
        for group, totals in enumerate(self._optimizer.fp32_groups_gradients):
            begin = 0
            for index, total in enumerate(totals):
                end = begin + total.numel()
                mine = [
                    number
                    for number, (_, of, start, part) in enumerate(cut)
                    if of == group and start < end and begin < start + part.numel()
                ]
                for number in mine:
                    needs[number] += 1
                self._buckets_of[group, index] = mine
                begin = end
        parts = [part for *_, part in cut]
        return _Reductions(self._engine, parts, needs, self._optimizer.dp_process_group)

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
            for flat in optimizer.fp32_groups_gradients_flat:
                flat.div_(distributed.world_size())

    def _for_norm(self, for_clipping: bool = False) -> Any:
        if for_clipping:
            return self._optimizer.fp32_groups_gradient_flat_partition
        return self._grads_for_norm()

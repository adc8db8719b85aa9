"""Gradients from backward to the optimiser, in fewer passes than DeepSpeed 0.19.8 makes.

Two of its ways are replaced by methods on the objects of one engine; the numbers stay the same.

| stage        | DeepSpeed                                   | here                               |
|--------------|---------------------------------------------|------------------------------------|
| 0            | one rank: flattens, reduces, copies back    | leaves the gradients where they are|
|              | clips by a norm that it keeps to itself     | one norm, for clipping and the log |
| 1, bfloat16  | adds float32 copies to zeros, zeroes twice  | writes the first micro batch       |
|              | reduces a float32 copy of all gradients     | reduces them in place, by buckets  |
|              | clips all gradients on every rank           | clips the rank's shard             |

Stage 1 in float32 and stages 2 and 3 keep DeepSpeed's own way.
"""

from __future__ import annotations

from typing import Any

import torch

from fd_large import distributed
from fd_large.engine.zero.private_names import get, replace
from fd_large.engine.zero.start import deepspeed


def spare_passes(engine: Any, *, bucket: int) -> None:
    """Replaces DeepSpeed's reduction and clipping where the table above says so.

    Args:
        engine: DeepSpeed's engine, before its first forward.
        bucket: Number of elements that are reduced together.
    """
    if isinstance(engine.optimizer, get("deepspeed.runtime.bf16_optimizer:BF16_Optimizer")):
        _Float32Sums(engine, bucket)
    elif engine.zero_optimization_stage() == 0:
        _WholeGradients(engine)


class _WholeGradients:
    """Stage 0: every rank holds and steps everything."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        if distributed.world_size() == 1:
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


class _Float32Sums:
    """Stage 1 in bfloat16: every rank sums all gradients in float32, and steps its shard."""

    def __init__(self, engine: Any, bucket: int) -> None:
        self._engine, self._optimizer, self._bucket = engine, engine.optimizer, bucket
        replace(engine, "buffered_allreduce_fallback", self._reduce)
        replace(engine.optimizer, "_update_hp_grad", self._add)
        replace(engine.optimizer, "clear_hp_grads", self._begin)
        self._grads_for_norm = replace(engine.optimizer, "get_grads_for_norm", self._for_norm)

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

    def _begin(self) -> None:
        """Marks all sums as empty: the next gradients overwrite them, so they need no zeroing."""
        for has in self._optimizer.fp32_groups_has_gradients:
            has[:] = [False] * len(has)

    @torch.no_grad()
    def _reduce(self, grads: Any = None, elements_per_buffer: int = 0) -> None:
        """Takes the mean over ranks, in the communication data type."""
        optimizer, ranks = self._optimizer, distributed.world_size()
        for flat, totals, has in zip(
            optimizer.fp32_groups_gradients_flat,
            optimizer.fp32_groups_gradients,
            optimizer.fp32_groups_has_gradients,
            strict=True,
        ):
            for total, present in zip(totals, has, strict=True):
                if not present:
                    total.zero_()
            if ranks == 1:
                continue
            for part in flat.split(self._bucket):
                sent = part.to(self._engine.communication_data_type)
                deepspeed.comm.all_reduce(sent, group=optimizer.dp_process_group)
                part.copy_(sent)
                part.div_(ranks)

    def _for_norm(self, for_clipping: bool = False) -> Any:
        if for_clipping:
            return self._optimizer.fp32_groups_gradient_flat_partition
        return self._grads_for_norm()

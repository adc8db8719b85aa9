"""ZeRO stage 0: every rank averages all gradients during backward, and steps all parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fd_large.engine.zero.gradient_buckets import Reductions
from fd_large.engine.zero.private_names import replace
from fd_large.ranks import distributed


class WholeGradients:
    """Averages gradients at ZeRO stage 0, where every rank holds and steps all parameters.

    Args:
        engine: DeepSpeed's engine, whose methods are replaced.
        bucket: Number of elements that are reduced together.

    Attributes:
        kept: Tensors that hold gradients, and stay in memory from step to step.
    """

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
    """Averages gradients over the ranks, in buckets that are reduced during backward.

    A bucket holds the gradients of adjacent parameters. The buckets of the last layers are reduced
    first, because backward makes their gradients first. Buckets stay in memory; from backward to
    the step, gradients are views of the buckets.
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
        self._reductions = Reductions(engine, flats, needs, [None] * len(rows))
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
            # The parameter has no gradient on this rank, but may have one on others.
            view.zero_()
        else:
            torch.div(parameter.grad, distributed.world_size(), out=view)
        parameter.grad = view

    def finish(self, grads: Any = None, elements_per_buffer: int = 0) -> None:
        """Reduces the remaining buckets after backward, and waits until all buckets are reduced.

        Replaces a method of DeepSpeed, whose arguments are ignored.
        """
        for parameter, view in self._views.items():
            if parameter.grad is not view:
                self._fill(parameter)
        self._reductions.finish()

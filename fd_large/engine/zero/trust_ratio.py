"""Scales gradients by norms of whole tensors, at any ZeRO stage.

An optimiser with a method `trust_ratio(weight_norm, gradient_norm)` needs norms of whole tensors,
but with ZeRO a rank holds only parts of the tensors. Before the optimiser steps, one small
all-reduce adds up the squared norms of the parts over the ranks. Then weight decay is added to each
matrix's gradient, and the sum is multiplied by the ratio. Gradients of vectors stay unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fd_large.engine.zero import state
from fd_large.engine.zero.engine import Engine
from fd_large.ranks import distributed


class _Part(NamedTuple):
    """Elements [start, stop), of matrix number `matrix`, in a tensor that the optimiser steps."""

    matrix: int
    start: int
    stop: int


class _TrustRatios:
    """Replaces the inner optimiser's step by a step that first scales the gradients.

    Args:
        inner: The optimiser, with a method `trust_ratio`.
        plain_step: The optimiser's own step.
        parts: {id of a tensor that the optimiser steps: the parts of matrices in this tensor}.
        num_matrices: Number of matrices of the model.
        is_split: Whether a rank may hold only parts of the matrices.
    """

    def __init__(
        self,
        inner: Any,
        plain_step: Callable[..., Any],
        parts: dict[int, list[_Part]],
        num_matrices: int,
        *,
        is_split: bool,
    ) -> None:
        self._inner, self._plain_step, self._parts = inner, plain_step, parts
        self._num_matrices, self._is_split = num_matrices, is_split

    def step(self, *arguments: Any, **named: Any) -> None:
        """Adds weight decay to the gradients of matrices, scales the sums, and steps the optimiser.

        The arguments are passed on to the optimiser's own step. Groups that DeepSpeed has emptied
        are left out.
        """
        device = distributed.device()
        squares = torch.zeros(2, self._num_matrices, dtype=torch.float64, device=device)
        scaled: list[tuple[int, Tensor]] = []
        for group in self._inner.param_groups:
            for owner in group["params"]:
                parts = () if owner.grad is None else self._parts.get(id(owner), ())
                for matrix, start, stop in parts:
                    weight = owner.data.view(-1)[start:stop]
                    gradient = owner.grad.view(-1)[start:stop]
                    gradient.add_(weight, alpha=group["weight_decay"])
                    for row, values in enumerate((weight, gradient)):
                        norm = torch.linalg.vector_norm(values, dtype=torch.float64)
                        squares[row, matrix] += norm.square().to(device)
                    scaled.append((matrix, gradient))
        norms = (distributed.sum_tensor(squares) if self._is_split else squares).sqrt()
        ratios = self._inner.trust_ratio(*norms)
        for matrix, gradient in scaled:
            gradient.mul_(ratios[matrix].to(gradient))
        self._plain_step(*arguments, **named)


def scale_by_norms(engine: Engine) -> None:
    """Lets an engine scale gradients before each step, if its optimiser has a trust ratio.

    Called before the first step, and after layer-wise learning rates were set.
    """
    inner = engine.gate.inner
    if not hasattr(inner, "trust_ratio"):
        return
    # Under ZeRO-3 a parameter's own shape is empty; the full one is beside it.
    names = [
        name
        for name, parameter in engine.task.named_parameters()
        if len(getattr(parameter, "ds_shape", parameter.shape)) > 1
    ]
    matrices = {name: number for number, name in enumerate(names)}
    parts: dict[int, list[_Part]] = defaultdict(list)
    for name, owner, start, stop in state.owned(engine):
        if name in matrices:
            parts[id(owner)].append(_Part(matrices[name], start, stop))
    ratios = _TrustRatios(
        inner, engine.gate.inner_step, parts, len(matrices), is_split=engine.stage > 0
    )
    engine.gate.inner_step = ratios.step

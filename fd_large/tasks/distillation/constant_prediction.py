"""The constant-prediction baseline: the loss of the best prediction that ignores the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fd_large.tasks.distillation.task import Distillation

Prepared = dict[str, Any]


def constant_prediction_loss(
    task: Distillation,
    batches: Callable[[], Iterator[tuple[Prepared, int]]],
    summed: Callable[[Tensor], Tensor],
) -> float:
    """Computes the loss of the best constant, one number per channel.

    A student that learnt only the mean of its targets has about this loss. Where the loss gives
    slope and curvature (`Loss.newton`), Newton's method goes on from the mean to the minimum.

    Args:
        task: The task, in evaluation mode; gives the targets.
        batches: Called once per pass; yields (prepared, weight), with weight 0 for padding.
        summed: Sums a tensor over the ranks.
    """
    mean: Tensor | None = None
    constant: Tensor | None = None
    loss = float("nan")
    # Pass 0 gives the mean; passes 1 and 2 one Newton step each; the last pass the loss.
    for step in range(4):
        totals: Tensor | None = None
        moves = True
        for prepared, weight in batches():
            tokens = task.reference(**prepared).flatten(0, 1)  # (B * N, C) float32
            if constant is None:
                constant = torch.zeros_like(tokens[0])
            rows = [tokens.sum(0), torch.zeros_like(tokens[0])]
            if mean is not None and (slopes := task.loss.newton(constant, tokens)):
                rows = list(slopes)
            else:
                moves = mean is None
            lost, terms = task.loss.total(constant.expand_as(tokens), tokens)
            sums = torch.stack([*rows, lost.expand_as(tokens[0])]).double()
            counts = sums.new_tensor([[len(tokens)], [terms]]).expand(2, sums.shape[1])
            part = torch.cat([sums, counts]) * weight
            totals = part if totals is None else totals + part
        assert totals is not None
        assert constant is not None
        first, second, lost_sum, count, terms_sum = summed(totals)
        loss = (lost_sum[0] / terms_sum[0]).item()
        if mean is None:
            mean = constant = (first / count).float()
        elif not moves:
            break
        elif step < 3:
            constant = (constant - first / second.clamp(min=1.0)).float()
    return loss

"""The constant-prediction baseline: the loss of the best prediction that ignores the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fd_large.tasks.distillation.task import Distillation

Prepared = dict[str, Any]
MOST_PASSES = 12
ENOUGH = 1e-3  # Share of the loss below which a step is the last one, from the third pass on.


def constant_prediction_loss(
    task: Distillation,
    batches: Callable[[], Iterator[tuple[Prepared, int]]],
    summed: Callable[[Tensor], Tensor],
) -> float:
    """Computes the loss of the best constant, one number per channel.

    A student that learnt only the mean of its targets has about this loss. Where the loss gives
    slope and curvature (`Loss.newton`), steps go on from the mean towards the minimum.

    Args:
        task: The task, in evaluation mode; gives the targets.
        batches: Called once per pass; yields (prepared, weight), with weight 0 for padding.
        summed: Sums a tensor over the ranks.
    """
    mean: Tensor | None = None
    constant: Tensor | None = None
    loss, least = float("nan"), float("inf")
    # Pass 0 gives the mean; each later one the loss by the constant before it, and a Newton step.
    for step in range(MOST_PASSES):
        totals: Tensor | None = None
        moves = True
        for prepared, weight in batches():
            tokens = task.reference(**prepared)  # (B, N, C) float32
            if constant is None:
                constant = torch.zeros_like(tokens[0, 0])
            rows = [tokens.sum((0, 1)), torch.zeros_like(constant)]
            if mean is not None and (slopes := task.loss.newton(constant, tokens)):
                rows = list(slopes)
            else:
                moves = mean is None
            lost = task.loss(constant.expand_as(tokens), tokens) * len(tokens)
            sums = torch.stack([*rows, lost.expand_as(constant)]).double()
            counts = sums.new_tensor([[len(tokens)], [tokens[..., 0].numel()]])
            part = torch.cat([sums, counts.expand(2, sums.shape[1])]) * weight
            totals = part if totals is None else totals + part
        assert totals is not None
        assert constant is not None
        first, second, lost_sum, images, places = summed(totals)
        before, loss = loss, (lost_sum[0] / images[0]).item()
        least = least if mean is None else min(least, loss)
        if mean is None:
            mean = constant = (first / places).float()
        elif not moves or (step >= 3 and not loss < before * (1 - ENOUGH)):
            break
        else:
            step_down = torch.where(second > 0, first / second, 0.0)
            constant = (constant - step_down).float()
    return least

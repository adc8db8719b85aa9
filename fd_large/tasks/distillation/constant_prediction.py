"""The constant-prediction baseline: the loss of the best prediction that ignores the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.tasks.distillation.task import Distillation

Prepared = dict[str, Any]


def constant_prediction_loss(
    task: Distillation,
    batches: Callable[[], Iterator[tuple[Prepared, int]]],
    summed: Callable[[Tensor], Tensor],
) -> float:
    """Computes the loss of the best constant, one number per channel.

    A student that learnt only the mean of its targets has this loss. Newton's method finds the
    minimum over constants from the mean, as the smooth L1 sum is convex.

    Args:
        task: The task, in evaluation mode; gives the targets.
        batches: Called once per pass; yields (prepared, weight), with weight 0 for padding.
        summed: Sums a tensor over the ranks.
    """
    mean: Tensor | None = None
    constant = torch.zeros(())
    loss = float("nan")
    # Pass 0 gives the mean; passes 1 and 2 one Newton step each; the last pass the loss.
    for step in range(4):
        totals: Tensor | None = None
        for prepared, weight in batches():
            tokens = task.reference(**prepared).flatten(0, 1)  # (B * N, C) float32
            if mean is None:
                rows = [tokens.sum(0), torch.zeros_like(tokens[0])]
            else:
                difference = constant - tokens
                inside = difference.abs() < task.beta
                slope = difference.clamp(-task.beta, task.beta) / task.beta
                rows = [slope.sum(0), inside.float().sum(0) / task.beta]
            lost = F.smooth_l1_loss(
                constant.expand_as(tokens), tokens, beta=task.beta, reduction="sum"
            )
            count = torch.full_like(tokens[0], len(tokens))
            part = torch.stack([*rows, lost.expand_as(tokens[0]), count]).double() * weight
            totals = part if totals is None else totals + part
        assert totals is not None
        first, second, lost_sum, count = summed(totals)
        if mean is None:
            mean = constant = (first / count).float()
        elif step < 3:
            constant = (constant - first / second.clamp(min=1.0)).float()
        loss = (lost_sum[0] / (count[0] * len(count))).item()
    return loss

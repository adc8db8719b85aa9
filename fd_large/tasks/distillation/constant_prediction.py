"""The constant-prediction baseline: the loss of the best prediction that ignores the image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fd_large.tasks.distillation.losses import Loss
from fd_large.tasks.distillation.target import references
from fd_large.tasks.distillation.task import Distillation

Prepared = dict[str, Any]
MOST_PASSES = 12
ENOUGH = 1e-3  # Share of the loss below which a step is the last one, from the third pass on.


def constant_prediction_losses(
    task: Distillation,
    batches: Callable[[], Iterator[tuple[Prepared, int]]],
    summed: Callable[[Tensor], Tensor],
) -> list[float]:
    """Computes the loss of the best constant, one number per channel, for each target.

    A student that learnt only the mean of its targets has about these losses. Where a loss gives
    slope and curvature (`Loss.newton`), steps go on from the mean towards the minimum.

    Args:
        task: The task, in evaluation mode; gives the targets.
        batches: Called once per pass; yields (prepared, weight), with weight 0 for padding.
        summed: Sums a tensor over the ranks.

    Returns: the loss without its weight, for each of `task.targets`.
    """
    searches = [_Search(target.loss) for target in task.targets]
    # Pass 0 gives the means; each later one the losses by the constants before it, and their
    # Newton steps.
    for _ in range(MOST_PASSES):
        for prepared, weight in batches():
            for search, tokens in zip(searches, references(task, **prepared), strict=True):
                search.add(tokens, weight)
        for search in searches:
            search.step(summed)
        if all(search.done for search in searches):
            break
    return [search.least for search in searches]


class _Search:
    """The best constant of one target, found pass by pass.

    Args:
        loss: The target's loss.

    Attributes:
        least: The least loss so far.
        done: Whether another pass would not lower it.
    """

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._constant: Tensor | None = None
        self._totals: Tensor | None = None
        self._passes, self._moves = 0, True
        self._last, self.least, self.done = float("nan"), float("inf"), False

    def add(self, tokens: Tensor, weight: int) -> None:
        """Adds the tokens (B, N, C) float32 of a batch to a pass; weight 0: they are padding."""
        if self.done:
            return
        if self._constant is None:
            self._constant = torch.zeros_like(tokens[0, 0])
        constant = self._constant
        rows = [tokens.sum((0, 1)), torch.zeros_like(constant)]
        if self._passes and (slopes := self._loss.newton(constant, tokens)):
            rows = list(slopes)
        else:
            self._moves = not self._passes
        lost = self._loss(constant.expand_as(tokens), tokens) * len(tokens)
        sums = torch.stack([*rows, lost.expand_as(constant)]).double()
        counts = sums.new_tensor([[len(tokens)], [tokens[..., 0].numel()]])
        part = torch.cat([sums, counts.expand(2, sums.shape[1])]) * weight
        self._totals = part if self._totals is None else self._totals + part

    def step(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Ends a pass: moves the constant, unless it is as good as it gets; a collective."""
        if self.done:
            return
        assert self._totals is not None
        assert self._constant is not None
        first, second, lost_sum, images, places = summed(self._totals)
        before, loss = self._last, (lost_sum[0] / images[0]).item()
        number, self._totals, self._last = self._passes, None, loss
        self._passes += 1
        if number == 0:
            self._constant = (first / places).float()
            return
        self.least = min(self.least, loss)
        if not self._moves or (number >= 3 and not loss < before * (1 - ENOUGH)):
            self.done = True
            return
        step_down = torch.where(second > 0, first / second, 0.0)
        self._constant = (self._constant - step_down).float()
        self._moves = True

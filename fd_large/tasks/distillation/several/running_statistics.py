"""Normalisers by mean and deviation of a teacher's channels over the images of whole steps.

Sums over the tokens of a step are added up over micro batches and ranks in float64, so that neither
changes a target. Running statistics are updated once with each accepted step, and are part of a
checkpoint. The published code gathers all features on every rank instead.

Source: Sariyildiz et al. (UNIC), arXiv 2408.05088, and Sariyildiz et al. (DUNE), arXiv 2503.14405;
constants as in their code.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fd_large.backbones.float32_buffers import Float32Buffers
from fd_large.engine.parts import Part
from fd_large.tasks.distillation.normalisers import Undo
from fd_large.tasks.distillation.section import MAP

FIRST_MOMENTUM, LAST_MOMENTUM = 1.0, 1e-3
_ROWS = 8192  # Tokens that are turned into float64 at once.


class Moments(NamedTuple):
    """Mean and unbiased variance of each channel, (2, C) float64: of prefix tokens, and of patches.

    Without tokens the moments are zeros.

    Attributes:
        mean, variance: The moments.
        present: (2, 1) bool, whether there were any tokens.
    """

    mean: Tensor
    variance: Tensor
    present: Tensor


def sums_of(tokens: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """Returns sums, sums of squares and number of tokens: (2, 2 C + 1), prefix tokens and patches.

    Args:
        tokens: (B, N, C), any floating-point dtype.
        num_prefix_tokens: Tokens of an image before its patches.

    Returns: float64.
    """
    width = tokens.shape[-1]
    totals = torch.zeros(2, 2 * width + 1, dtype=torch.float64, device=tokens.device)
    parts = (tokens[:, :num_prefix_tokens], tokens[:, num_prefix_tokens:])
    for total, part in zip(totals, parts, strict=True):
        for rows in part.detach().reshape(-1, width).split(_ROWS):
            rows = rows.double()
            number = rows.new_full((1,), len(rows))
            total += torch.cat([rows.sum(0), rows.square().sum(0), number])
    return totals


def moments_of(sums: Tensor) -> Moments:
    """Returns the moments of tokens from their sums; see `sums_of`."""
    width = sums.shape[-1] // 2
    first, squares, number = sums.split([width, width, 1], dim=-1)
    mean = first / number.clamp(min=1)
    scatter = (squares - number * mean.square()).clamp(min=0)
    return Moments(mean, scatter / (number - 1).clamp(min=1), number > 0)


def momentum_at(progress: float) -> float:
    """Returns the weight of a step's statistics in the running ones, on a cosine schedule.

    Args:
        progress: Fraction of the run's steps that came before, in [0, 1).
    """
    share = (1 + math.cos(math.pi * progress)) / 2
    return LAST_MOMENTUM + (FIRST_MOMENTUM - LAST_MOMENTUM) * share


class RunningStatistics(Float32Buffers):
    """Normalises by running statistics from before the step's update (UNIC).

    Prefix tokens (CLS) and patches have statistics of their own. In the first step tokens stay
    nearly unchanged, since the mean is 0 and the deviation 1.

    Args:
        width: Channels of the tokens, C.

    Attributes:
        num_prefix_tokens: Tokens of an image before its patches; the target sets it.
        moments: Moments of the present step, if tokens are normalised by them.
        noted: Sums over the tokens that this rank has seen in the step, (K,), or None.
    """

    of_step: ClassVar[bool] = False
    """Whether tokens are normalised in training by the statistics of their own step."""
    _EPS: ClassVar[float] = 1e-6

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.num_prefix_tokens = width, 0
        self.register_buffer("mean", torch.zeros(2, width))
        self.register_buffer("deviation", torch.ones(2, width))
        self.moments: Moments | None = None
        self.noted: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the tokens (B, N, C) in float32 (float64 stays), normalised.

        Args:
            tokens: (B, N, C), any floating-point dtype.
        """
        if self.training and torch.is_grad_enabled() and not self.of_step:
            sums = self.sums_of(tokens)
            self.noted = sums if self.noted is None else self.noted + sums
        tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        mean, deviation = self.mean, self.deviation
        if self.training and self.moments is not None:
            mean, deviation = self.moments.mean, self._deviation(self.moments)
        divisor = self._divisor(deviation).to(tokens)
        places = torch.arange(tokens.shape[-2], device=tokens.device)
        rows = (places >= self.num_prefix_tokens).long()
        return (tokens - mean.to(tokens)[rows]) / divisor[rows]

    def sums_of(self, tokens: Tensor) -> Tensor:
        """Returns the sums of the tokens (B, N, C), flat: see `sums_of`."""
        return sums_of(tokens, self.num_prefix_tokens).flatten()

    def moments_of(self, sums: Tensor) -> Moments:
        """Returns the moments from flat sums."""
        return moments_of(sums.view(2, -1))

    @property
    def divisor(self) -> Tensor:
        """Divisor of tokens outside of a step, (2, C): for prefix tokens and for patches."""
        return self._divisor(self.deviation)

    def undo(self) -> Undo:
        """Returns the inverse of the normalisation, by the running statistics."""
        return Undo(self.mean, self.divisor, None)

    def state(self, label: str) -> dict[str, nn.Module]:
        """Returns this Module by its name in checkpoints: running.LABEL."""
        return {f"running.{label or MAP}": self}

    def part(self, target: Any) -> Part:
        """Returns the part that updates the statistics, for the target that it normalises."""
        return FollowsStep(target, self) if self.of_step else FollowsForwards(self)

    @torch.no_grad()
    def move(self, step: Moments, momentum: float) -> None:
        """Updates the running statistics by a step's moments."""
        weight = momentum * step.present.to(self.mean)
        self.mean.lerp_(step.mean.to(self.mean), weight)
        self.deviation.lerp_(self._deviation(step).to(self.deviation), weight)

    def _deviation(self, step: Moments) -> Tensor:
        return step.variance.sqrt() + self._EPS

    def _divisor(self, deviation: Tensor) -> Tensor:
        return deviation + self._EPS


class StepStatistics(RunningStatistics):
    """Normalises in training by the statistics of the step, in evaluation by running ones (DUNE).

    A standard deviation below 0.001 counts as 0.001. A step's statistics cover all its images, so
    that a step needs two passes.
    """

    of_step = True
    _LEAST: ClassVar[float] = 1e-3

    def _deviation(self, step: Moments) -> Tensor:
        return step.variance.sqrt()

    def _divisor(self, deviation: Tensor) -> Tensor:
        return deviation.clamp(min=self._LEAST)


class FollowsForwards(Part):
    """Updates running statistics by the tokens of a step's forwards."""

    of_step = False

    def __init__(self, running: RunningStatistics) -> None:
        self._running, self._momentum = running, 0.0

    def before_step(self, progress: float) -> None:
        """Drops the sums of a trial."""
        self._momentum, self._running.noted = momentum_at(progress), None

    def noted(self) -> Tensor | None:
        """Returns the sums over the tokens that this rank has seen in the step, (K,), or None."""
        return self._running.noted

    def after_step(self, noted: Tensor | None) -> None:
        """Updates the statistics by the sums over the ranks."""
        if noted is not None:
            self._running.move(self._running.moments_of(noted), self._momentum)
        self._running.noted = None


class FollowsStep(Part):
    """Statistics that normalise a step's tokens and then update the running statistics."""

    def __init__(self, target: Any, running: RunningStatistics) -> None:
        self._target, self._running, self._momentum = target, running, 0.0

    def sums(self, task: Any, prepared: dict[str, Any]) -> Tensor:
        """Returns the sums over the teacher's tokens, (K,)."""
        return self._running.sums_of(self._target.tokens_of(task, **prepared))

    def take(self, totals: Tensor, micro_batches: int) -> None:
        """Takes the step's statistics."""
        self._running.moments = self._running.moments_of(totals)

    def before_step(self, progress: float) -> None:
        """Drops the statistics of the step before, or of a trial."""
        self._momentum, self._running.moments = momentum_at(progress), None

    def after_step(self, noted: Tensor | None) -> None:
        """Moves the running statistics towards the statistics of the step."""
        assert self._running.moments is not None
        self._running.move(self._running.moments, self._momentum)

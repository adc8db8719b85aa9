"""Normalisers by the mean and deviation of each channel of a teacher, over whole steps.

Sums over the tokens of a step are added up over micro-batches and ranks in float64, so that the
numbers of micro-batches and ranks do not change a target. The published code all-gathers all
features instead. Running statistics are updated once in each step that is not skipped, and are part
of a checkpoint.

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
    """Mean and unbiased variance of each channel over tokens.

    The first row of each tensor is for prefix tokens, the second for patches. The moments of a row
    without tokens are zeros.

    Attributes:
        mean, variance: (2, C) float64.
        present: (2, 1) bool, whether there were any tokens.
    """

    mean: Tensor
    variance: Tensor
    present: Tensor


def sums_of(tokens: Tensor, num_prefix_tokens: int = 0) -> Tensor:
    """Returns each channel's sum and sum of squares over tokens, and the number of tokens.

    Args:
        tokens: (B, N, C), of any floating-point dtype.
        num_prefix_tokens: Number of tokens of an image before its patches.

    Returns: (2, 2 C + 1) float64. The first row is for prefix tokens, the second for patches; a row
        has C sums, C sums of squares and the number of tokens.
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
    """Returns the mean and variance of tokens.

    Args:
        sums: (2, 2 C + 1), the result of `sums_of`, or a sum of such results.
    """
    width = sums.shape[-1] // 2
    first, squares, number = sums.split([width, width, 1], dim=-1)
    mean = first / number.clamp(min=1)
    scatter = (squares - number * mean.square()).clamp(min=0)
    return Moments(mean, scatter / (number - 1).clamp(min=1), number > 0)


def momentum_at(progress: float) -> float:
    """Returns the weight of a step's statistics in the running statistics.

    The weight falls by a cosine schedule from `FIRST_MOMENTUM` to `LAST_MOMENTUM`.

    Args:
        progress: Fraction of the run's steps that were done before this step, in [0, 1).
    """
    share = (1 + math.cos(math.pi * progress)) / 2
    return LAST_MOMENTUM + (FIRST_MOMENTUM - LAST_MOMENTUM) * share


class RunningStatistics(Float32Buffers):
    """Normalises tokens by running statistics over earlier steps, as UNIC does.

    Prefix tokens (CLS) and patches have separate statistics. In the first step tokens stay nearly
    unchanged, since the running mean is 0 and the running deviation 1.

    Args:
        width: Number of channels of the tokens, C.

    Attributes:
        mean, deviation: (2, C), the running statistics of prefix tokens and of patches.
        num_prefix_tokens: Number of tokens of an image before its patches, which the target sets.
        moments: Mean and variance over the tokens of the present step, by which training then
            normalises; None to normalise by the running statistics.
        noted: Sums over the tokens that this rank has normalised in the step, as the method
            `sums_of` returns them; None before the first tokens.
    """

    of_step: ClassVar[bool] = False
    """Whether training normalises the tokens of a step by the statistics of the same step."""
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
        """Returns the normalised tokens (B, N, C), in float64 if they were float64, else float32.

        Args:
            tokens: (B, N, C), of any floating-point dtype.
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
        """Returns the sums from which mean and variance are computed, as a vector (K,) float64.

        They are the result of this module's function `sums_of`, flattened.

        Args:
            tokens: (B, N, C), of any floating-point dtype.
        """
        return sums_of(tokens, self.num_prefix_tokens).flatten()

    def moments_of(self, sums: Tensor) -> Moments:
        """Returns the mean and variance of tokens.

        Args:
            sums: (K,), the result of the method `sums_of`, or a sum of such results.
        """
        return moments_of(sums.view(2, -1))

    @property
    def divisor(self) -> Tensor:
        """Number for each channel by which centred tokens are divided, (2, C).

        It follows from the running deviation. The first row is for prefix tokens, the second for
        patches.
        """
        return self._divisor(self.deviation)

    def undo(self) -> Undo:
        """Returns the inverse of the normalisation by the running statistics."""
        return Undo(self.mean, self.divisor, None)

    def state(self, label: str) -> dict[str, nn.Module]:
        """Returns {name in checkpoints: this Module}; the name is running.LABEL.

        Args:
            label: The target's label, LABEL. For a single teacher's map it is "", and the name is
                running.map.
        """
        return {f"running.{label or MAP}": self}

    def part(self, target: Any) -> Part:
        """Returns the part of a step that updates these statistics.

        Args:
            target: The target whose teacher's tokens are normalised.
        """
        return FollowsStep(target, self) if self.of_step else FollowsForwards(self)

    @torch.no_grad()
    def move(self, step: Moments, momentum: float) -> None:
        """Moves the running statistics towards a step's moments.

        Args:
            step: The moments.
            momentum: Weight of the step in the new statistics, in [0, 1].
        """
        weight = momentum * step.present.to(self.mean)
        self.mean.lerp_(step.mean.to(self.mean), weight)
        self.deviation.lerp_(self._deviation(step).to(self.deviation), weight)

    def _deviation(self, step: Moments) -> Tensor:
        """Returns the standard deviations of a step, (2, C), that update the running deviations.

        Args:
            step: Mean and variance over the tokens of the step.
        """
        return step.variance.sqrt() + self._EPS

    def _divisor(self, deviation: Tensor) -> Tensor:
        """Returns the number for each channel by which centred tokens are divided, (2, C).

        Args:
            deviation: (2, C), the standard deviations of prefix tokens and of patches.
        """
        return deviation + self._EPS


class StepStatistics(RunningStatistics):
    """Normalises tokens by the statistics of the present step, as DUNE does.

    Evaluations use running statistics. A standard deviation below 0.001 counts as 0.001. The
    statistics of a step are over all images of the step, so that a step needs two passes.
    """

    of_step = True
    _LEAST: ClassVar[float] = 1e-3

    def _deviation(self, step: Moments) -> Tensor:
        return step.variance.sqrt()

    def _divisor(self, deviation: Tensor) -> Tensor:
        return deviation.clamp(min=self._LEAST)


class FollowsForwards(Part):
    """Updates running statistics from the tokens that the forwards of a step have normalised.

    Args:
        running: The running statistics.
    """

    of_step = False

    def __init__(self, running: RunningStatistics) -> None:
        self._running, self._momentum = running, 0.0

    def before_step(self, progress: float) -> None:
        """Sets the momentum of the step, and drops sums that were noted outside of a step.

        Args:
            progress: Fraction of the run's steps that were done before, in [0, 1).
        """
        self._momentum, self._running.noted = momentum_at(progress), None

    def noted(self) -> Tensor | None:
        """Returns the sums over the tokens that this rank has normalised in the step, (K,) float64.

        These are sums as in `RunningStatistics.sums_of`; None if this rank normalised no tokens.
        """
        return self._running.noted

    def after_step(self, noted: Tensor | None) -> None:
        """Moves the running statistics towards the statistics of the step.

        Args:
            noted: (K,), the sums over the tokens of the step on all ranks. If there were none, it
                is None, and the running statistics stay as they are.
        """
        if noted is not None:
            self._running.move(self._running.moments_of(noted), self._momentum)
        self._running.noted = None


class FollowsStep(Part):
    """Normalises a step's tokens by the step's statistics, which then update running statistics.

    Args:
        target: The target whose teacher's tokens are normalised.
        running: The running statistics.
    """

    def __init__(self, target: Any, running: RunningStatistics) -> None:
        self._target, self._running, self._momentum = target, running, 0.0

    def sums(self, task: Any, prepared: dict[str, Any]) -> Tensor:
        """Returns the sums over the teacher's tokens of a micro-batch, (K,) float64.

        Args:
            task: The task, whose student is not run.
            prepared: Result of the task's `prepare` on the micro-batch.
        """
        return self._running.sums_of(self._target.tokens_of(task, **prepared))

    def take(self, totals: Tensor, micro_batches: int) -> None:
        """Computes the mean and variance of the step's tokens.

        Args:
            totals: (K,), the sums over all micro-batches of all ranks.
            micro_batches: Not used.
        """
        self._running.moments = self._running.moments_of(totals)

    def before_step(self, progress: float) -> None:
        """Sets the momentum of the step, and drops the statistics that `take` stored earlier.

        Args:
            progress: Fraction of the run's steps that were done before, in [0, 1).
        """
        self._momentum, self._running.moments = momentum_at(progress), None

    def after_step(self, noted: Tensor | None) -> None:
        """Moves the running statistics towards the statistics of the step, which `take` computed.

        Args:
            noted: Not used.
        """
        assert self._running.moments is not None
        self._running.move(self._running.moments, self._momentum)

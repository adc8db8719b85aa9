"""The learning rate of a step: linear warm-up, then a half cosine, as timm's scheduler.

Counted in optimiser steps, so that neither ranks nor accumulation can change a rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class CosineSchedule:
    """L(t) over T steps, W of them warm-up.

    Attributes:
        peak: Learning rate after warm-up.
        warmup_start: Learning rate at t = 0.
        minimum: Learning rate at t >= T.
        total: T.
        warmup: W.
    """

    peak: float
    warmup_start: float
    minimum: float
    total: int
    warmup: int

    def value(self, t: int) -> float:
        """L(t)."""
        if t < self.warmup:
            return self.warmup_start + t * (self.peak - self.warmup_start) / self.warmup
        if t >= self.total:
            return self.minimum
        phase = math.pi * (t - self.warmup) / (self.total - self.warmup)
        return self.minimum + 0.5 * (self.peak - self.minimum) * (1 + math.cos(phase))

    def at_update(self, update: int) -> float:
        """The rate that step `update` (from 0) runs at: L(max(update - 1, 0)).

        The official loop advances its scheduler after the step with that step's own index, so the
        first two steps both run at the warm-up start.
        """
        return self.value(max(update - 1, 0))

    def scaled_at(self, update: int, scale: float) -> float:
        """The rate of a layer whose peak is scaled; both ends of the schedule are not."""
        return replace(self, peak=self.peak * scale).at_update(update)


def official_accumulated_rate(
    schedule: CosineSchedule, update: int, *, accumulation: int, micro_batches_per_epoch: int
) -> float:
    """The official code's rate under accumulation, where T, W and the index count micro batches.

    Not used in training: it makes the rate depend on how a batch is split. Micro batches that are
    left at the end of an epoch are dropped, but counted.

    Args:
        schedule: T and W in micro batches.
        update: From 0.
        accumulation: Micro batches per step.
        micro_batches_per_epoch: Of the official loop's one process.
    """
    if update == 0:
        return schedule.value(0)
    epoch, of_epoch = divmod(update - 1, micro_batches_per_epoch // accumulation)
    return schedule.value(epoch * micro_batches_per_epoch + accumulation * (of_epoch + 1) - 1)

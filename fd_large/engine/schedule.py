"""The learning rate of a step: linear warm-up, then a half cosine, as timm's scheduler.

Counted in optimiser steps, so that neither ranks nor accumulation change a learning rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class CosineSchedule:
    """L(t) over T steps, the first W of them warm-up.

    Attributes:
        peak: Learning rate after warm-up.
        warmup_start: Learning rate at t = 0.
        minimum: Learning rate at t >= T.
        total: Number of steps, T.
        warmup: Number of warm-up steps, W.
    """

    peak: float
    warmup_start: float
    minimum: float
    total: int
    warmup: int

    def value(self, t: int) -> float:
        """Returns L(t)."""
        if t < self.warmup:
            return self.warmup_start + t * (self.peak - self.warmup_start) / self.warmup
        if t >= self.total:
            return self.minimum
        phase = math.pi * (t - self.warmup) / (self.total - self.warmup)
        return self.minimum + 0.5 * (self.peak - self.minimum) * (1 + math.cos(phase))

    def at_step(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0: L(max(step - 1, 0)).

        The official loop advances its scheduler after the step with that step's own index, so the
        first two steps both have the learning rate of the warm-up's start.
        """
        return self.value(max(step - 1, 0))

    def scaled_at(self, step: int, scale: float) -> float:
        """Returns the learning rate of a layer whose peak is scaled; both ends are not."""
        return replace(self, peak=self.peak * scale).at_step(step)

"""Computes the learning rate of a step: warm-up, then cosine, polynomial or step decay.

Steps are those of the optimiser, so that neither the number of ranks nor accumulation changes a
learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of the step.

    Attributes:
        peak: Learning rate after warm-up.
        warmup_start: Learning rate of the first step.
        minimum: Learning rate at the end.
        total: Number of steps, warm-up included.
        warmup: Number of warm-up steps.
    """

    peak: float
    warmup_start: float
    minimum: float
    total: int
    warmup: int

    def at_step(self, step: int) -> float:
        """Returns the learning rate of step `step`, counted from 0."""
        raise NotImplementedError

    def scaled_at(self, step: int, scale: float) -> float:
        """Returns the rate of a layer whose peak is `scale` * `peak`, at a step counted from 0."""
        raise NotImplementedError

    def _warm(self, step: int) -> float:
        """Returns the warm-up's factor of the learning rate.

        As in mmcv 1.x, it rises linearly from `warmup_start` / `peak` at step 0 to 1 at step
        `warmup`, and stays 1.
        """
        if step >= self.warmup:
            return 1.0
        start = self.warmup_start / self.peak if self.peak else 1.0
        return 1 - (1 - step / self.warmup) * (1 - start)


class CosineSchedule(Schedule):
    """Linear warm-up, then half a period of a cosine to the minimum, as in timm's scheduler."""

    def value(self, t: int) -> float:
        """Returns L(t), the learning rate after `t` steps of the schedule."""
        if t < self.warmup:
            return self.warmup_start + t * (self.peak - self.warmup_start) / self.warmup
        if t >= self.total:
            return self.minimum
        phase = math.pi * (t - self.warmup) / (self.total - self.warmup)
        return self.minimum + 0.5 * (self.peak - self.minimum) * (1 + math.cos(phase))

    def at_step(self, step: int) -> float:
        """Returns L(max(step - 1, 0)), where L is `value`, for a step that is counted from 0.

        The official loop advances its scheduler after the step with that step's own index, so the
        first two steps both have the learning rate of the warm-up's start.
        """
        return self.value(max(step - 1, 0))

    def scaled_at(self, step: int, scale: float) -> float:
        """As `Schedule.scaled_at`; the start of the warm-up and the minimum are not scaled."""
        return replace(self, peak=self.peak * scale).at_step(step)


@dataclass(frozen=True)
class PolynomialSchedule(Schedule):
    """Polynomial decay: a power of the remaining fraction of steps, with a linear warm-up.

    Attributes:
        power: The exponent; 1 is a straight line, as in every recipe. Other exponents are for
            comparisons with published schedules.
        after_warmup: True if the decay begins when the warm-up ends, as in mmengine. False if the
            decay begins at once and is multiplied by the warm-up's factor, as in mmcv 1.x.
    """

    power: float = 1.0
    after_warmup: bool = False

    def at_step(self, step: int) -> float:
        """Returns the learning rate of step `step`, counted from 0."""
        if self.after_warmup:
            # mmengine reaches peak and minimum in the last step of warm-up and run.
            if step < self.warmup:
                share = step / max(self.warmup - 1, 1)
                return self.warmup_start + share * (self.peak - self.warmup_start)
            return self._decayed(step - self.warmup, self.total - self.warmup - 1)
        return self._decayed(step, self.total) * self._warm(step)

    def _decayed(self, done: int, steps: int) -> float:
        left = 1 - min(done / max(steps, 1), 1)
        return self.minimum + (self.peak - self.minimum) * left**self.power

    def scaled_at(self, step: int, scale: float) -> float:
        """As `Schedule.scaled_at`; the start of the warm-up is scaled too, the minimum is not."""
        scaled = replace(self, peak=self.peak * scale, warmup_start=self.warmup_start * scale)
        return scaled.at_step(step)


class RiseAndFall(Schedule):
    """A rise to the peak in the warm-up, then a fall to the minimum in the same number of steps.

    After a fraction x of the steps of the rise or of the fall, x^0.9 of the change is done. After
    the fall, the learning rate stays at the minimum.

    Source: train.py of SwinTransformer/MIM-Depth-Estimation, which rises in half of the epochs.
    """

    power = 0.9

    def at_step(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0; the official code counts from 1."""
        done = (step + 1) / max(self.warmup, 1)
        if done < 1:
            return self.warmup_start + (self.peak - self.warmup_start) * done**self.power
        fallen = min(done - 1, 1) ** self.power
        return self.peak + (self.minimum - self.peak) * fallen

    def scaled_at(self, step: int, scale: float) -> float:
        """Returns the learning rate of a layer at step `step`: `at_step(step)` times `scale`."""
        return scale * self.at_step(step)


@dataclass(frozen=True)
class StepSchedule(Schedule):
    """The peak learning rate, divided by ten at each drop, times the factor of a linear warm-up.

    Attributes:
        drops: Fractions of the run after which the learning rate falls, in rising order.

    Source: the detectors of mmdetection and detectron2.
    """

    drops: tuple[float, ...] = ()

    def at_step(self, step: int) -> float:
        """Returns the learning rate of step `step`, counted from 0."""
        fallen = sum(step >= round(drop * self.total) for drop in self.drops)
        return max(self.peak * 0.1**fallen, self.minimum) * self._warm(step)

    def scaled_at(self, step: int, scale: float) -> float:
        """As `Schedule.scaled_at`; the start of the warm-up is scaled too, the minimum is not."""
        scaled = replace(self, peak=self.peak * scale, warmup_start=self.warmup_start * scale)
        return scaled.at_step(step)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": CosineSchedule,
    "linear": PolynomialSchedule,
    "linear_after_warmup": partial(PolynomialSchedule, after_warmup=True),
    "rise_and_fall": RiseAndFall,
    "steps": StepSchedule,
}
"""Constructors of schedules from (peak, start, minimum, total, warm-up), by their names in a
recipe; `steps` also takes `drops`."""

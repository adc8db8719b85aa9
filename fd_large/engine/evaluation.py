"""Evaluations of a run: what a task measures, how often, and how an evaluation is interrupted."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fd_large.engine.zero.engine import Engine

Panel = dict[str, Any]
"""Arrays to draw, by name."""


class Evaluation(NamedTuple):
    """Something that a task measures as it trains.

    Attributes:
        measure: Called with the number of finished steps, whether it is the last evaluation, and a
            function to call between batches; returns numbers by name, and a panel where one is
            due. All ranks call it alike, with the task in training mode and with the average of
            the weights in their place where the run keeps one.
        every: Steps between two calls; 0 evaluates only before the first step and after the last.
    """

    measure: Callable[[int, bool, Callable[[], None]], tuple[dict[str, float], Panel | None]]
    every: int = 0

    def due(self, step: int, last: bool) -> bool:
        """Returns whether it is made after so many steps."""
        return last or step == 0 or (bool(self.every) and step % self.every == 0)


def steps_between(evaluations: Sequence[Evaluation]) -> int:
    """Returns the steps after which some evaluation may be due; 0: at start and end only."""
    return math.gcd(*(evaluation.every for evaluation in evaluations))


class Interrupted(Exception):
    """Raised on all ranks alike to leave an evaluation."""


class evaluating:
    """Puts the task into evaluation mode without gradients, and back into training mode."""

    def __init__(self, engine: Engine) -> None:
        self._task, self._no_grad = engine.task, torch.no_grad()

    def __enter__(self) -> None:
        self._task.eval()
        self._no_grad.__enter__()

    def __exit__(self, *error: object) -> None:
        self._no_grad.__exit__(*error)
        self._task.train()

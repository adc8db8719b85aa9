"""Evaluations of a run: what a task measures, how often, and how an evaluation is left."""

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
        measure: (steps so far, whether for the last time, called between batches) -> numbers by
            name, and a panel where one is due. Called by all ranks alike, the task in training
            mode and with the average of the weights in their place where the run keeps one.
        every: Steps between two calls; 0: only before the first step and after the last.
    """

    measure: Callable[[int, bool, Callable[[], None]], tuple[dict[str, float], Panel | None]]
    every: int = 0

    def due(self, update: int, last: bool) -> bool:
        """Whether it is made after so many steps."""
        return last or update == 0 or (bool(self.every) and update % self.every == 0)


def steps_between(evaluations: Sequence[Evaluation]) -> int:
    """Returns the steps after which some evaluation may be due; 0: at start and end only."""
    return math.gcd(*(evaluation.every for evaluation in evaluations))


class Interrupted(Exception):
    """The ranks have agreed to leave an evaluation."""


class evaluating:
    """Evaluation mode without gradients, and training mode again."""

    def __init__(self, engine: Engine) -> None:
        self._task, self._no_grad = engine.task, torch.no_grad()

    def __enter__(self) -> None:
        self._task.eval()
        self._no_grad.__enter__()

    def __exit__(self, *error: object) -> None:
        self._no_grad.__exit__(*error)
        self._task.train()

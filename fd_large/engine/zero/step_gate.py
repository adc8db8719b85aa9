"""Stops an optimiser step between its gradients and its weights, at any ZeRO stage.

DeepSpeed's `step` computes the norm, clips and calls the inner optimiser, once or once per group.
The gate stands in front of that call: gradients are complete, no weight has moved yet, and a
refused step leaves weights, moments and step counts as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fd_large.engine.zero.private_names import replace


class StepGate:
    """Asks once per step whether the inner optimiser may step.

    Args:
        inner: The optimiser that DeepSpeed wraps, or steps itself at stage 0. Its `step` is
            replaced on this object.

    Attributes:
        inner: The optimiser.
        inner_step: The function that performs an allowed step.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self._ask: Callable[[], bool] | None = None
        self._open = True
        self.inner_step = replace(inner, "step", self._guarded)

    def step(self, engine: Any, ask: Callable[[], bool]) -> bool:
        """Lets the engine step; returns whether the weights moved.

        Args:
            engine: DeepSpeed's engine, after the last micro batch of a step.
            ask: Returns whether to go on. Called on every rank before the first weight moves,
                unless DeepSpeed refuses the step by itself because the norm is not finite.
        """
        # Stays closed where DeepSpeed discards the gradients and never steps.
        self._ask, self._open = ask, False
        engine.step()
        moved, self._ask, self._open = self._open, None, True
        return moved

    def _guarded(self, *arguments: Any, **named: Any) -> Any:
        if self._ask is not None:
            ask, self._ask = self._ask, None
            self._open = ask()
        return self.inner_step(*arguments, **named) if self._open else None

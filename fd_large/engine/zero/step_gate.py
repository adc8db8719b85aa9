"""Stops an optimiser step between its gradients and its weights, at any ZeRO stage.

DeepSpeed's `step` computes the gradients' norm, asks whether it is finite, clips and calls the
inner optimiser, once or once per group. The gate answers DeepSpeed's question by the ranks'
decision about the step, so that the host waits for the device only once. At stage 0, where
DeepSpeed does not ask, the ranks decide when the inner optimiser is called. In both cases the
gradients are complete and no weight has moved, so that a skipped step leaves weights, moments and
step counts unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fd_large.engine.zero.private_names import get, replace


class Answer(NamedTuple):
    """The ranks' decision about a step.

    Attributes:
        goes_on: Whether the optimiser makes the step.
        finite: Whether the norm of the gradients is finite.
    """

    goes_on: bool
    finite: bool


class StepGate:
    """Lets an optimiser step only if the ranks decide so, once per step.

    Args:
        inner: The torch optimiser, whose method `step` the gate replaces. DeepSpeed wraps it,
            except at stage 0, where DeepSpeed calls its `step` directly.

    Attributes:
        inner: The optimiser.
        inner_step: The function that makes the optimiser's step if the ranks decide to step.
    """

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self._ask: Callable[[Any], Answer] | None = None
        self._answer = _OPEN
        self.inner_step = replace(inner, "step", self._guarded)

    def step(self, engine: Any, ask: Callable[[Any], Answer]) -> bool:
        """Lets the engine step; returns whether the weights changed.

        Args:
            engine: DeepSpeed's engine, after the last micro batch of a step.
            ask: Decides whether to step, from the norm of the gradients before clipping. At stage 0
                the norm is None, because only an attribute of DeepSpeed's optimiser has it. Called
                once on every rank, before the first weight changes.
        """
        self._ask = ask
        _stepping.append(self)
        try:
            engine.step()
        finally:
            _stepping.pop()
        moved, self._answer = self._answer.goes_on, _OPEN
        return moved

    def answer(self, norm: Any = None) -> Answer:
        """Returns the ranks' decision about the present step.

        The first call in a step lets the ranks decide, from the `norm` of the gradients before
        clipping (None at stage 0); later calls return the same decision. Outside of `step`, the
        optimiser may always step.
        """
        if self._ask is not None:
            ask, self._ask = self._ask, None
            self._answer = ask(norm)
        return self._answer

    def _guarded(self, *arguments: Any, **named: Any) -> Any:
        return self.inner_step(*arguments, **named) if self.answer().goes_on else None


_OPEN = Answer(True, True)
_stepping: list[StepGate] = []


def ask_once() -> None:
    """Makes DeepSpeed's optimisers ask the gate whether the norm of the gradients is finite."""
    optimisers = ("zero.stage3", "zero.stage_1_and_2", "bf16_optimizer")
    for module in (get(f"deepspeed.runtime.{module_name}") for module_name in optimisers):
        replace(module, "is_invalid_grad_norm", _is_invalid)
    replace(module, "clip_tensors_by_global_norm", _clip)


def _is_invalid(norm: Any) -> bool:
    if _stepping:
        return not _stepping[-1].answer(norm).finite
    return bool(get("deepspeed.runtime.utils:is_invalid_grad_norm")(norm))


def _clip(input_tensors: list[Tensor], max_norm: float, global_norm: Tensor, mpu: Any) -> None:
    """Multiplies tensors in place by min(1, `max_norm` / (`global_norm` + 1e-6)).

    Replaces DeepSpeed's `clip_tensors_by_global_norm`, which makes the host wait for the norm.
    `global_norm` is the L2 norm of the gradients of all ranks, a scalar; `mpu` is ignored.
    """
    factor = (max_norm / (global_norm + 1e-6)).clamp(max=1.0)
    for tensor in input_tensors:
        tensor.detach().mul_(factor)

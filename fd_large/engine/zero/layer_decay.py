"""Learning rates by layer inside two parameter groups.

DeepSpeed flattens a group, so a group for each layer would cost a flat tensor and collectives for
each of them. Here the groups stay two, and the inner optimiser is shown the stretches of a flat
partition, each layer's at its own rate: views, no tensor of parameter size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fd_large.engine.zero import state
from fd_large.engine.zero.engine import Engine


class Stretch(NamedTuple):
    """Elements [start, stop) of a flattened tensor, of one layer."""

    start: int
    stop: int
    scale: float


class LayerRates:
    """Steps in place of the inner optimiser, each layer at its rate.

    Args:
        inner: AdamW of torch, DeepSpeed or apex.
        plain_step: Its `step`.
        stretches: id of a tensor that the optimiser steps -> its stretches. Elements in none
            (padding at an end) are not stepped.

    Attributes:
        rate_of: Scale -> learning rate of the step under way.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        plain_step: Callable[..., Any],
        stretches: Mapping[int, list[Stretch]],
    ) -> None:
        self._inner, self._plain_step = inner, plain_step
        self._stretches = {owner: _joined(cuts) for owner, cuts in stretches.items()}
        self.rate_of: Callable[[float], float] = lambda scale: scale

    def step(self, *arguments: Any, **named: Any) -> None:
        """One step over the groups as they stand; DeepSpeed empties those it does not mean."""
        inner = self._inner
        groups, states = inner.param_groups, inner.state
        cut_groups: list[dict[str, Any]] = []
        cut_state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        stepped: list[tuple[dict[str, Any], dict[str, Any], Tensor]] = []
        for group in groups:
            by_scale: dict[float, list[Tensor]] = defaultdict(list)
            for owner in group["params"]:
                if owner.grad is None:
                    continue
                held = state.optimizer_state(inner, owner)
                for start, stop, scale in self._stretches.get(id(owner), ()):
                    view = owner.data.view(-1)[start:stop]
                    view.grad = owner.grad.view(-1)[start:stop]
                    cut_state[view] = _cut(held, start, stop)
                    by_scale[scale].append(view)
            for scale, views in by_scale.items():
                cut_groups.append({**group, "params": views, "lr": self.rate_of(scale)})
            if by_scale:
                stepped.append((group, cut_groups[-1], cut_groups[-1]["params"][0]))
        inner.param_groups, inner.state = cut_groups, cut_state
        try:
            self._plain_step(*arguments, **named)
        finally:
            inner.param_groups, inner.state = groups, states
        # Counts of steps: torch and DeepSpeed keep them with the tensor, apex with the group.
        for group, cut, view in stepped:
            if "step" in cut:
                group["step"] = cut["step"]
            for owner in group["params"]:
                if owner.grad is not None:
                    states[owner]["step"] = cut_state[view]["step"]


def _cut(held: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    """A stretch's part of a tensor's state: moments are views, the count is a copy."""
    step = held["step"]
    moments = {name: held[name].view(-1)[start:stop] for name in state.MOMENTS}
    return {**moments, "step": step.clone() if isinstance(step, Tensor) else step}


def by_layer(engine: Engine, decay: float) -> LayerRates | None:
    """Lets an engine step each layer at its rate; None where all have one.

    Args:
        engine: Before its first step.
        decay: Factor of the rate from one layer to the one below it.
    """
    if decay == 1.0:
        return None
    stretches: dict[int, list[Stretch]] = defaultdict(list)
    for name, owner, start, stop in state.stretches(engine):
        scale = engine.task.layer_scale(name, decay)
        stretches[id(owner)].append(Stretch(start, stop, scale))
    rates = LayerRates(engine.gate.inner, engine.gate.inner_step, stretches)
    engine.gate.inner_step = rates.step
    return rates


def _joined(cuts: list[Stretch]) -> list[Stretch]:
    """Neighbours of one scale as one stretch, with the padding between them."""
    joined: list[Stretch] = []
    for cut in sorted(cuts):
        if joined and joined[-1].scale == cut.scale:
            joined[-1] = joined[-1]._replace(stop=cut.stop)
        elif cut.stop > cut.start:
            joined.append(cut)
    return joined

"""Steps each layer at its own learning rate, with two parameter groups for all layers.

DeepSpeed flattens each group, so a group per layer would cost a flat tensor and collectives for
each layer. Here there are still two groups, and the inner optimiser steps slices of the flat
tensors, each layer's slice at the layer's learning rate. The slices are views, so that no tensor of
parameter size is made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fd_large.engine.zero import state
from fd_large.engine.zero.engine import Engine
from fd_large.engine.zero.optimizer import kept_by
from fd_large.ranks import distributed


class LayerSlice(NamedTuple):
    """Elements [start, stop) of a flat tensor, and `scale`, the factor of their learning rate."""

    start: int
    stop: int
    scale: float


class LayerLearningRates:
    """Replaces the inner optimiser's step by a step with a learning rate for each layer.

    Args:
        inner: The optimiser, which acts element by element.
        plain_step: The optimiser's own `step`.
        slices: {id of a tensor that the optimiser steps: slices of this tensor}. Elements outside
            all slices (padding at an end), or in a slice of scale 0, are not stepped.

    Attributes:
        at_scale: Function that maps a scale to the learning rate in the current step.
    """

    def __init__(
        self,
        inner: torch.optim.Optimizer,
        plain_step: Callable[..., Any],
        slices: Mapping[int, list[LayerSlice]],
    ) -> None:
        self._inner, self._plain_step = inner, plain_step
        self._slices = {
            owner: [cut for cut in _joined(cuts) if cut.scale] for owner, cuts in slices.items()
        }
        self.at_scale: Callable[[float], float] = lambda scale: scale

    def step(self, *arguments: Any, **named: Any) -> None:
        """Steps all slices at their layers' learning rates.

        The arguments are passed on to the optimiser's own step. Groups that DeepSpeed has emptied
        are left out.
        """
        inner = self._inner
        groups, states, state_fields = inner.param_groups, inner.state, kept_by(inner)
        cut_groups: list[dict[str, Any]] = []
        cut_state: dict[Tensor, dict[str, Any]] = defaultdict(dict)
        places: dict[Tensor, tuple[Tensor, int, int]] = {}
        stepped: list[tuple[dict[str, Any], dict[str, Any], Tensor]] = []
        for group in groups:
            by_scale: dict[float, list[Tensor]] = defaultdict(list)
            for owner in group["params"]:
                if owner.grad is None:
                    continue
                owner_state = state.optimizer_state(inner, owner)
                for start, stop, scale in self._slices.get(id(owner), ()):
                    view = owner.data.view(-1)[start:stop]
                    view.grad = owner.grad.view(-1)[start:stop]
                    places[view] = owner, start, stop
                    cut_state[view] = _cut(owner_state, state_fields.moments, start, stop)
                    by_scale[scale].append(view)
            for scale, views in by_scale.items():
                cut_groups.append({**group, "params": views, "lr": self.at_scale(scale)})
            if by_scale:
                stepped.append((group, cut_groups[-1], cut_groups[-1]["params"][-1]))
        inner.param_groups, inner.state = cut_groups, cut_state
        try:
            self._plain_step(*arguments, **named)
        finally:
            inner.param_groups, inner.state = groups, states
        for view, (owner, start, stop) in places.items():
            for name in state_fields.moments:
                # Where the optimiser has put a new tensor in the place of the slice.
                part = states[owner][name].view(-1)[start:stop]
                if part.data_ptr() != cut_state[view][name].data_ptr():
                    part.copy_(cut_state[view][name])
        # Step counts: torch keeps one with each tensor, DeepSpeed's FusedAdam counts with the last
        # tensor of a group, apex with the group.
        for group, cut, view in stepped:
            if "step" in cut:
                group["step"] = cut["step"]
            for owner in group["params"]:
                if state_fields.count is not None and owner.grad is not None:
                    states[owner]["step"] = cut_state[view]["step"]


def by_layer(engine: Engine, decay: float, backbone_rate: float = 1.0) -> LayerLearningRates | None:
    """Lets an engine step each layer at its own learning rate; all ranks must call this function.

    Args:
        engine: The engine, before its first step.
        decay: Factor of the learning rate from each layer to the layer before it.
        backbone_rate: Factor of the learning rate of the whole student.

    Returns: the object that steps the layers; None if all layers have the same learning rate.
    """
    slices: dict[int, list[LayerSlice]] = defaultdict(list)
    scales: set[float] = set()
    for name, owner, start, stop in state.owned(engine):
        scale = engine.task.layer_scale(name, decay)
        if name.startswith("student."):
            scale *= backbone_rate
        slices[id(owner)].append(LayerSlice(start, stop, scale))
        scales.add(scale)
    # Ranks may hold different layers, but all or none of them take this way.
    if not distributed.any_rank(bool(scales - {1.0})):
        return None
    rates = LayerLearningRates(engine.gate.inner, engine.gate.inner_step, slices)
    engine.gate.inner_step = rates.step
    return rates


def _cut(
    owner_state: dict[str, Any], moments: Iterable[str], start: int, stop: int
) -> dict[str, Any]:
    """Returns the optimiser's state of elements [start, stop) of a flattened tensor, by name.

    The result has a view of each of `moments`, and a copy of the step count if there is one.
    """
    cut = {name: owner_state[name].view(-1)[start:stop] for name in moments}
    if "step" in owner_state:
        step = owner_state["step"]
        cut["step"] = step.clone() if isinstance(step, Tensor) else step
    return cut


def _joined(cuts: list[LayerSlice]) -> list[LayerSlice]:
    """Returns the slices, sorted, with neighbours of the same scale joined, padding included.

    Empty slices are left out.
    """
    joined: list[LayerSlice] = []
    for cut in sorted(cuts):
        if joined and joined[-1].scale == cut.scale:
            joined[-1] = joined[-1]._replace(stop=cut.stop)
        elif cut.stop > cut.start:
            joined.append(cut)
    return joined

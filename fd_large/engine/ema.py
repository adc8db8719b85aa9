"""An exponential moving average of the trained weights, sharded like the float32 masters.

Each rank averages the elements that it owns: four bytes per owned element, no communication, and
the same numbers at any ZeRO stage. The average lives in the optimiser's state under its own key,
beside the moments, and is stored with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fd_large.backbones import batch_norm
from fd_large.engine.evaluation import Interrupted
from fd_large.engine.zero import state
from fd_large.engine.zero.engine import Engine


class Ema:
    """Keeps ema = decay * ema + (1 - decay) * weight after each step, in float32.

    The average begins as a copy of the weights. Running statistics of batch norms are averaged
    too, because the live statistics belong to the live weights.

    Args:
        engine: The engine, before its first step, or just restored from a checkpoint.
        decay: Weight of the previous average in each update, in (0, 1).
    """

    def __init__(self, engine: Engine, decay: float) -> None:
        self._engine, self._decay = engine, decay
        self._statistics = batch_norm.statistics_of(engine.task)
        engine.averages.update({name: live.clone() for name, live in self._statistics.items()})
        with torch.no_grad():
            for owner in self._owners():
                beside = (
                    engine.disk.zeros(owner.numel()) if engine.disk else torch.empty_like(owner)
                )
                self._state(owner)[state.EMA] = beside.view_as(owner).copy_(owner)

    def update(self) -> None:
        """Updates the average by the present weights, after a step that was not skipped."""
        with torch.no_grad():
            for owner in self._owners():
                self._state(owner)[state.EMA].lerp_(owner, 1 - self._decay)
            for name, average in self._engine.averages.items():
                average.lerp_(self._statistics[name], 1 - self._decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Lets the task compute with the average within the context; all ranks must enter it.

        Weights and average are exchanged back at its end and after `Interrupted`, but not after
        other errors.
        """
        self._exchange()
        try:
            yield
        except Interrupted:
            self._exchange()
            raise
        # Not after other errors: if one rank alone fails, the others wait in some other collective.
        self._exchange()

    def _exchange(self) -> None:
        with torch.no_grad():
            for owner in self._owners():
                average = self._state(owner)[state.EMA]
                weights = owner.detach().clone()
                owner.copy_(average)
                average.copy_(weights)
            for name, average in self._engine.averages.items():
                live = self._statistics[name]
                live_values = live.clone()
                live.copy_(average)
                average.copy_(live_values)
        state.redistribute(self._engine)

    def _owners(self) -> list[Tensor]:
        owners = {id(owner): owner for _, owner, _, _ in state.owned(self._engine)}
        return list(owners.values())

    def _state(self, owner: Tensor) -> dict[str, Tensor]:
        return state.optimizer_state(self._engine.gate.inner, owner)

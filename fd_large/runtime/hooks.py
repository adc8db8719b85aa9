"""What observes a run, and what it may ask for.

A hook never stops, saves or skips by itself: it returns a Request, the loop agrees it over the
ranks and carries it out, so that all ranks do the same in the same step.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy
from torch import Tensor

from fd_large.recipes.run import Run


@dataclass(frozen=True)
class Request:
    """What a hook asks the loop to do after this update."""

    save: bool = False
    stop: bool = False


NOTHING = Request()


@dataclass(frozen=True)
class Setting:
    """What a run is, told once before the first update.

    Attributes:
        folder: The run's folder.
        run: The resolved recipe.
        first_update: Where the run starts or goes on, from 0.
        total_updates: Where it ends.
        micro_batch_size: Images per rank and forward.
        accumulation: Micro batches per update.
        world_size: Ranks.
    """

    folder: Path
    run: Run
    first_update: int
    total_updates: int
    micro_batch_size: int
    accumulation: int
    world_size: int


@dataclass(frozen=True)
class Update:
    """One finished update.

    Attributes:
        index: From 0.
        total: Updates of the whole run, as known now; a time box sets it after the first ones.
        epoch: From 0.
        loss: Scalar float32 on the device, this rank's mean over its micro batches; reading it
            stops the host, so a hook keeps it until a log step.
        grad_norm: Global L2 norm before clipping, a number or a device scalar.
        learning_rate: What the update ran at.
    """

    index: int
    total: int
    epoch: int
    loss: Tensor
    grad_norm: Tensor | float
    learning_rate: float


class Hook:
    """Observes a run; every method runs on every rank, so collectives are allowed in all."""

    def on_start(self, setting: Setting) -> None:
        """Before the first update."""

    def after_update(self, update: Update) -> Request:
        """After each update."""
        return NOTHING

    def on_save(self, index: int) -> None:
        """Before a checkpoint of `index` updates: a resume from it must find what they left."""

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """After an evaluation that followed `index` updates, the same numbers on every rank.

        Names: see evaluation_names.py.
        """

    def on_features(self, index: int, panel: dict[str, numpy.ndarray]) -> None:
        """Maps of a few held-out pictures, before the first update and after the last.

        images (n, S, S, 3) uint8; teacher, whitened, and student, projected, (n, h, w, C) float32.
        """

    def on_end(self, status: str) -> None:
        """After the last update: `done`, or why the run ended early."""

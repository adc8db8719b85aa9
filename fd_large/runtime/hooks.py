"""What observes a run, and what it may ask for.

A hook never stops, saves or skips by itself. What one rank alone knows (a signal came) is a Wish,
which the loop agrees over the ranks; what all ranks know alike (the loss is not finite) is a
Verdict, the same on each of them. The loop carries both out, so that all ranks do the same in the
same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy
from torch import Tensor

from fd_large.recipes.run import Run

DONE, PREEMPTED, NOT_SAVED = "done", "preempted", "not saved"
GUARD = "guard"
"""How a run ends: the status in summary.json. A task's own hooks may add more."""


@dataclass(frozen=True)
class Wish:
    """What this rank would like after the step under way; done if any rank wishes it.

    Attributes:
        stop: Save, and end as `preempted`.
        save: Write a checkpoint after the step.
    """

    stop: bool = False
    save: bool = False


@dataclass(frozen=True)
class Verdict:
    """What is to be done with a step; the same on every rank.

    Attributes:
        skip: Leave weights and moments as they were.
        roll_back: Take the state of the newest checkpoint of at most so many steps, and go on
            with the next data; None: no.
        stop: End without saving, under this status; empty: go on.
    """

    skip: bool = False
    roll_back: int | None = None
    stop: str = ""

    @classmethod
    def all_of(cls, verdicts: Iterable[Verdict]) -> Verdict:
        """The gravest of several."""
        given = list(verdicts)
        back = [v.roll_back for v in given if v.roll_back is not None]
        stop = next((v.stop for v in given if v.stop), "")
        return cls(any(v.skip for v in given), min(back, default=None), stop)


NOTHING, PASS = Wish(), Verdict()


@dataclass(frozen=True)
class Setting:
    """What a run is, told once before the first step.

    Attributes:
        folder: The run's folder.
        run: The resolved recipe.
        first_update: Where the run starts or goes on, from 0.
        total_updates: Where it ends.
        micro_batch_size: Images per rank and forward.
        accumulation: Micro batches per step.
        world_size: Ranks.
        checkpoint_bytes: Of a whole checkpoint, over all ranks.
        name_of: A sample's place in the listing -> where it lies.
    """

    folder: Path
    run: Run
    first_update: int
    total_updates: int
    micro_batch_size: int
    accumulation: int
    world_size: int
    checkpoint_bytes: int = 0
    name_of: Callable[[int], str] = str


@dataclass(frozen=True)
class Update:
    """One step, the same numbers on every rank.

    Attributes:
        index: From 0.
        total: Steps of the whole run, as known now; a time box sets it after the first ones.
        epoch: From 0.
        loss: Mean over ranks and micro batches.
        grad_norm: Global L2 norm before clipping.
        learning_rate: What the step ran at.
        skipped: Whether weights and moments stayed as they were.
        data_seconds: That this rank waited for its images; its own number.
    """

    index: int
    total: int
    epoch: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool = False
    data_seconds: float = 0.0


@dataclass(frozen=True)
class Evidence:
    """What a skipped step was made of.

    Attributes:
        images: (B, 3, S, S) uint8, this rank's images of the step in order.
        positions: (B,) int64, their places in the epoch's order.
        indices: (B,) int64, their places in the listing.
        losses: Of this rank's micro batches.
        maxima: Layer -> largest magnitude of its output on the unchanged weights, in execution
            order, over all ranks; infinite where one is not finite.
    """

    images: Tensor
    positions: Tensor
    indices: Tensor
    losses: list[float]
    maxima: dict[str, float]


class Hook:
    """Observes a run; every method runs on every rank, so collectives are allowed in all."""

    def on_start(self, setting: Setting) -> None:
        """Before the first step."""

    def beat(self) -> None:
        """The run moves: called with every micro batch, in training and in evaluation."""

    def wish(self) -> Wish:
        """What this rank would like now; asked before each optimiser step, and in evaluations."""
        return NOTHING

    def judge(self, update: Update) -> Verdict:
        """What becomes of a step whose loss and norm are known and that no weight felt yet.

        The answer must follow from what is the same on every rank.
        """
        return PASS

    def on_skip(self, update: Update, evidence: Evidence) -> None:
        """After a step that was skipped."""

    def on_roll_back(self, update: Update, restored: int) -> None:
        """After the state of `restored` steps was taken back."""

    def after_update(self, update: Update) -> Verdict:
        """After each step; the same answer on every rank. `skip` comes too late here."""
        return PASS

    def on_save(self, index: int) -> Verdict:
        """Before a checkpoint of `index` steps: a resume from it must find what they left.

        The same answer on every rank; `stop` ends the run without this checkpoint.
        """
        return PASS

    def on_saved(self, seconds: float) -> None:
        """A checkpoint is complete, so many seconds after it was begun."""

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """After an evaluation that followed `index` steps, the same numbers on every rank.

        Names: see evaluation_names.py.
        """

    def on_features(self, index: int, panel: dict[str, numpy.ndarray]) -> None:
        """Maps of a few held-out images, before the first step and after the last.

        images (n, S, S, 3) uint8; teacher, whitened, and student, projected, (n, h, w, C) float32.
        """

    def on_end(self, status: str) -> None:
        """After the last step: `done`, or why the run ended early: `preempted`, `not saved`,
        `guard`, `teacher changed`."""

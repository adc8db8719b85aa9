"""Hooks: observers of a run, and their requests.

A hook never stops, saves or skips by itself. A single rank's reason (such as a signal) is a Wish,
on which the ranks agree in the loop; a reason known to all ranks (such as a non-finite loss) is a
Verdict, the same on each of them. The loop carries out both, so that all ranks act in the same
step. A tracker only shows numbers: see `Tracker`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from torch import Tensor

from fd_large.plan.counts import StepFlops

DONE, PREEMPTED, NOT_SAVED = "done", "preempted", "not saved"
GUARD = "guard"
FAILED, INTERRUPTED = "failed", "interrupted"
"""Values of `status` in summary.json for how a run ended. A task's own hooks may add others."""

Row = dict[str, Any]
"""A line of metrics.jsonl, for a step: update (its number from 0), epoch, loss, grad_norm,
learning_rate, and skipped, which is true if the weights stayed as they were. A run at several image
sizes also has image_size, the side of the step's images. All rows of an interval have the same
images_per_second (of all ranks, in steps alone), data_wait (fraction of the time for which rank 0
waited for images) and memory_bytes (the peak of rank 0 so far). They have tflops_per_gpu if the
FLOPs of the models can be counted, and also mfu and hardware_utilisation if the card's peak is
known (plan/utilisation.py; the values of several students add up)."""


@dataclass(frozen=True)
class Wish:
    """A rank's request after the present step; the request of any rank is carried out.

    Attributes:
        stop: Save, and end as `preempted`.
        save: Write a checkpoint after the step.
    """

    stop: bool = False
    save: bool = False


NOTHING = Wish()


@dataclass(frozen=True)
class Verdict:
    """The decision about a step; the same on every rank.

    Attributes:
        skip: Leave weights and moments as they were.
        roll_back: Largest step of the checkpoint to restore, after which training continues with
            the next data; None for no roll-back.
        stop: Status under which to end without saving, or "".
    """

    skip: bool = False
    roll_back: int | None = None
    stop: str = ""

    @classmethod
    def all_of(cls, verdicts: Iterable[Verdict | None]) -> Verdict:
        """Joins verdicts: it skips if any skips; the earliest roll-back and the first end count."""
        present = [verdict for verdict in verdicts if verdict is not None]
        back = [v.roll_back for v in present if v.roll_back is not None]
        stop = next((v.stop for v in present if v.stop), "")
        return cls(any(v.skip for v in present), min(back, default=None), stop)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The facts of a run, passed to the hooks once before the first step.

    Attributes:
        folder: The run's folder.
        facts: First entries of summary.json (`TrainingJob.summary`).
        first_update: Number of steps before this start.
        total_updates: Steps of the whole run.
        global_batch_size: Images a step, over all ranks.
        micro_batch_size: Images per rank and forward.
        accumulation: Micro batches per step.
        world_size: Number of ranks.
        log_every: Number of steps after which metrics are written and shown.
        flops: FLOPs of a micro batch on one rank, by image side if the run has several, else
            under 0; empty if they cannot be counted.
        image_sizes: Image sides of a run with several, else empty.
        checkpoint_bytes: Size of a whole checkpoint, over all ranks.
        start: Id of this start of the run.
        owned: Returns whether this start still owns the folder.
        metrics: Labels of the evaluations' metrics (`TrainingJob.metrics`).
        evaluated: Function from the metrics of the first evaluation, and the newest value of every
            metric, to their entries of summary.json (`TrainingJob.evaluated`).
        name_of: Function from a sample's place in the listing to its path or name.
    """

    folder: Path
    facts: Mapping[str, Any]
    first_update: int
    total_updates: int
    global_batch_size: int
    micro_batch_size: int
    accumulation: int
    world_size: int
    log_every: int
    flops: Mapping[int, StepFlops] = field(default_factory=dict)
    image_sizes: tuple[int, ...] = ()
    checkpoint_bytes: int = 0
    start: str = ""
    owned: Callable[[], bool] = lambda: True
    metrics: Mapping[str, str] = field(default_factory=dict)
    evaluated: Callable[[Mapping[str, float], Mapping[str, float]], Mapping[str, Any]] = (
        lambda first, last: last
    )
    name_of: Callable[[int], str] = str

    def must_own(self) -> None:
        """Raises OSError, as a failed write does, if another start has taken over the folder."""
        if not self.owned():
            raise OSError(f"{self.folder} is gone or has a new owner")


@dataclass(frozen=True)
class Update:
    """The numbers of a step, the same on every rank.

    Attributes:
        index: Number of the step, from 0.
        epoch: Number of the epoch, from 0.
        loss: Mean over ranks and micro batches.
        grad_norm: Global L2 norm before clipping.
        learning_rate: The learning rate of this step.
        skipped: Whether weights and moments stayed as they were.
        data_seconds: Seconds that this rank waited for its images; differs between ranks.
        students: Number of students that take the step together, on one pass of the frozen models.
        image_size: Side of the step's images in pixels if the run has several, else 0.
    """

    index: int
    epoch: int
    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool = False
    data_seconds: float = 0.0
    students: int = 1
    image_size: int = 0


@dataclass(frozen=True)
class Evidence:
    """The input of a skipped step, and its effect on the models.

    Attributes:
        images: (b, 3, H, W) uint8, this rank's images of the step in order, micro batch by micro
            batch; each may have a size of its own.
        positions: (B,) int64, their places in the epoch's order.
        indices: (B,) int64, their places in the listing.
        losses: Loss of each of this rank's micro batches.
        maxima: Layer -> largest magnitude of its output on the unchanged weights, in execution
            order, over all ranks; infinite for non-finite outputs.
        not_finite: KIND.NAME of the tensors of this rank's state that hold NaN or infinity; KIND is
            master, ema, or a moment of the optimiser, such as exp_avg.
    """

    images: list[Tensor]
    positions: Tensor
    indices: Tensor
    losses: list[float]
    maxima: dict[str, float]
    not_finite: list[str] = field(default_factory=list)


class Hook:
    """Observes a run; every method runs on every rank, so collectives are allowed in all.

    A verdict must be the same on every rank; None has no objection.
    """

    def on_start(self, setting: Setting) -> None:
        """Called before the first step."""

    def beat(self) -> None:
        """Called with every micro batch, in training and in evaluation, as a sign of life."""

    def wish(self) -> Wish:
        """Returns this rank's wish; asked before each optimiser step, and in evaluations."""
        return NOTHING

    def on_stop(self) -> None:
        """Called on all ranks before the run saves and stops by a rank's wish."""

    def judge(self, update: Update) -> Verdict | None:
        """Called before the weights change, with loss and gradient norm of the step."""

    def on_skip(self, update: Update, evidence: Evidence) -> None:
        """Called after a skipped step."""

    def on_roll_back(self, update: Update, restored: int) -> None:
        """Called after a roll-back to the state of `restored` steps."""

    def after_update(self, update: Update) -> Verdict | None:
        """Called after each step, when it can no longer be skipped."""

    def on_save(self, index: int) -> Verdict | None:
        """Called before a checkpoint of `index` steps, to write files that a resume needs.

        `stop` ends the run without this checkpoint.
        """

    def on_saved(self, seconds: float) -> None:
        """Called when a checkpoint is complete, with the seconds since its beginning."""

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """Called after an evaluation at step `index`, with the same metrics on every rank."""

    def on_features(self, index: int, panel: dict[str, numpy.ndarray]) -> None:
        """Called with maps of a few held-out images, before the first step and after the last.

        images (n, S, S, 3) uint8; teacher, whitened, and student, projected, (n, h, w, C) float32.
        """

    def on_end(self, status: str) -> None:
        """Called after the last step, with `done` or the reason of an early end."""

    def on_failure(self, status: str, reason: str) -> None:
        """Called instead of `on_end` after an error; no collective, since ranks may be gone.

        Args:
            status: `failed` or `interrupted`.
            reason: The error in a sentence.
        """


class Tracker:
    """Shows the numbers of a run (a progress bar, TensorBoard); exists on rank 0 only.

    The Meter calls it, with rows and evaluations after they are in the run's own files; nothing
    that a tracker does changes a run, and no collective is allowed in it.
    """

    def on_start(self, setting: Setting) -> None:
        """Called before the first step."""

    def on_step(self, update: Update) -> None:
        """Called after each step, before the rows that end with it."""

    def on_rows(self, rows: list[Row]) -> None:
        """Called after an interval of `log_every` steps, shorter before a save or the end."""

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """Called with the metrics of an evaluation at step `index`, by their names on disk."""

    def on_end(self, status: str) -> None:
        """Called after the last step."""

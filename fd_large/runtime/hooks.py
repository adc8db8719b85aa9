"""Hooks, which observe a run and request actions, and trackers, which only show its numbers.

A hook never stops, saves or skips by itself; the training loop carries out its requests, so that
all ranks act in the same step. A request for a reason that only one rank may have (such as a
signal) is a `Wish`, on which the ranks agree in the loop. A request for a reason that all ranks
have (such as a non-finite loss) is a `Verdict`, which is the same on every rank.
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
"""Values of `status` in summary.json, which say how a run ended. Hooks of a task may add others."""

Row = dict[str, Any]
"""A line of metrics.jsonl, with the numbers of a step. It has update (the step's index from 0),
epoch, loss, grad_norm and learning_rate. If the weights stayed as they were, it also has skipped,
which is true. In a run at several image sizes it also has image_size, the side of the step's images
in pixels.

All rows of an interval of `log_every` steps have the same images_per_second (of all ranks, without
evaluations and checkpoints), data_wait (fraction of the time for which rank 0 waited for images)
and memory_bytes (rank 0's peak so far). They also have tflops_per_gpu if the FLOPs of the models
can be counted, and mfu and hardware_utilisation if the GPU's peak is known (plan/utilisation.py;
the values of several students add up)."""


@dataclass(frozen=True)
class Wish:
    """A rank's request for an action after the current step; one rank's request suffices.

    Attributes:
        stop: Whether to save a checkpoint and end the run with status "preempted".
        save: Whether to save a checkpoint.
    """

    stop: bool = False
    save: bool = False


NOTHING = Wish()


@dataclass(frozen=True)
class Verdict:
    """A hook's decision about a step, the same on every rank.

    Attributes:
        skip: Whether to skip the step, so that weights and moments stay as they were.
        roll_back: Largest allowed number of finished steps of the checkpoint to restore; training
            then continues with the next data. None for no roll-back.
        stop: Status with which the run ends without saving, or "" if the run goes on.
    """

    skip: bool = False
    roll_back: int | None = None
    stop: str = ""

    @classmethod
    def all_of(cls, verdicts: Iterable[Verdict | None]) -> Verdict:
        """Combines `verdicts`, those of several hooks; None stands for no request and is ignored.

        The result skips if any verdict does, has the smallest `roll_back` of all (None if no
        verdict has one), and the first `stop` that is not "".
        """
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
        first_update: Number of steps that were finished before this launch; 0 for a new run.
        total_updates: Number of steps of the whole run.
        global_batch_size: Number of images in a step, over all ranks.
        micro_batch_size: Number of images in a micro-batch of one rank.
        accumulation: Number of micro-batches of a rank in a step.
        world_size: Number of ranks.
        log_every: Number of steps after which metrics are written and shown.
        flops: FLOPs of a micro-batch on one rank, by side of the images. In a run with a single
            image size the key is 0. Empty if FLOPs cannot be counted.
        image_sizes: Sides of the images in pixels in a run with several image sizes, else empty.
        checkpoint_bytes: Size of a whole checkpoint in bytes, over all ranks.
        start: ID of this launch of the run.
        owned: Function that returns whether this launch still owns the folder: the folder exists,
            and no other launch has taken it over.
        metrics: Labels of the evaluations' metrics, by name (`TrainingJob.metrics`).
        evaluated: Function that takes the metrics of the first evaluation and the newest value of
            every metric, and returns entries for summary.json (`TrainingJob.evaluated`).
        name_of: Function that takes the index of a sample in the dataset, and returns the path or
            name of the sample.
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
        """Raises OSError if the run's folder is gone or another launch of a run owns it.

        Callers handle this error as a failed write.
        """
        if not self.owned():
            raise OSError(f"{self.folder} is gone or has a new owner")


@dataclass(frozen=True)
class Update:
    """The numbers of a step; all except `data_seconds` are the same on every rank.

    Attributes:
        index: Index of the step, from 0.
        epoch: Index of the epoch, from 0.
        loss: Mean loss over ranks and micro-batches.
        grad_norm: Global L2 norm of the gradient before clipping.
        learning_rate: The learning rate of this step.
        skipped: Whether the step was skipped, so that weights and moments stayed as they were.
        data_seconds: Seconds for which this rank waited for images.
        students: Number of students that train in this step on the same outputs of the teachers.
        image_size: Side of the step's images in pixels in a run with several image sizes, else 0.
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
    """This rank's images of a skipped step, and what the models computed from them.

    Attributes:
        images: For each of this rank's micro-batches in order, the images, (b, 3, H, W) uint8;
            different micro-batches may have different sizes.
        positions: (B,) int64, positions of the images of all micro-batches in the epoch's order.
        indices: (B,) int64, indices of the images of all micro-batches in the dataset.
        losses: Loss of each of this rank's micro-batches.
        maxima: Largest magnitude of each layer's output with the unchanged weights, over all ranks,
            by name of the layer in execution order; infinite for a non-finite output.
        not_finite: KIND.NAME of each tensor of this rank's state that has NaN or infinity, where
            KIND is "master", "ema", or a moment of the optimiser such as "exp_avg".
    """

    images: list[Tensor]
    positions: Tensor
    indices: Tensor
    losses: list[float]
    maxima: dict[str, float]
    not_finite: list[str] = field(default_factory=list)


class Hook:
    """Base class of observers of a run, whose methods do nothing.

    Every method is called on every rank, so that collectives are allowed, except in `on_failure`. A
    returned verdict must be the same on every rank; None requests nothing.
    """

    def on_start(self, setting: Setting) -> None:
        """Called before the first step; `setting` has the facts of the run."""

    def beat(self) -> None:
        """Called for every micro-batch of training and evaluation, to show that the run goes on."""

    def wish(self) -> Wish:
        """Returns this rank's request; called before each optimiser step, and in evaluations."""
        return NOTHING

    def on_stop(self) -> None:
        """Called before the run saves a checkpoint and stops because a rank requested it."""

    def judge(self, update: Update) -> Verdict | None:
        """Called before the weights change; `update` has the loss and gradient norm of the step.

        Returns: a verdict, or None to accept the step.
        """

    def on_skip(self, update: Update, evidence: Evidence) -> None:
        """Called after a step was skipped.

        Args:
            update: The numbers of the skipped step.
            evidence: This rank's images of the step, and what the models computed from them.
        """

    def on_roll_back(self, update: Update, restored: int) -> None:
        """Called after a roll-back that followed step `update`.

        Args:
            update: The last step before the roll-back.
            restored: Number of finished steps of the restored state.
        """

    def after_update(self, update: Update) -> Verdict | None:
        """Called after each step, also a skipped step; `update` has the numbers of the step.

        Returns: a verdict, whose `skip` is ignored, or None to go on.
        """

    def on_save(self, index: int) -> Verdict | None:
        """Called before a checkpoint after `index` steps, to write files that a resume needs.

        Returns: a verdict whose `stop` ends the run without this checkpoint, or None to go on.
        """

    def on_saved(self, seconds: float) -> None:
        """Called when a checkpoint is complete, which took `seconds` seconds."""

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """Called with the results of an evaluation, the same on every rank.

        Args:
            index: Number of finished steps.
            metrics: {name: value} of the evaluation.
        """

    def on_features(self, index: int, panel: dict[str, numpy.ndarray]) -> None:
        """Called with feature maps of a few held-out images, before the first step and at the end.

        Args:
            index: Number of finished steps.
            panel: `images`, (n, S, S, 3) uint8; `teacher`, the whitened maps of the teacher,
                (n, h, w, C) float32; `student`, the projected maps of the student, (n, h, w, C)
                float32.
        """

    def on_end(self, status: str) -> None:
        """Called after the last step.

        Args:
            status: How the run ended: "done", or another status after an early end.
        """

    def on_failure(self, status: str, reason: str) -> None:
        """Called instead of `on_end` after an error.

        Collectives are not allowed here, since other ranks may be gone.

        Args:
            status: "failed" or "interrupted".
            reason: The error in a sentence.
        """


class Tracker:
    """Base class of what shows the numbers of a run, such as a progress bar or TensorBoard.

    A tracker exists on rank 0 only, and is called by the Meter. Rows and evaluations are already in
    the run's own files when a tracker gets them. A tracker cannot change the run, and must not call
    collectives.
    """

    def on_start(self, setting: Setting) -> None:
        """Called before the first step; `setting` has the facts of the run."""

    def on_step(self, update: Update) -> None:
        """Called after each step with its numbers, before `on_rows` gets the step's row.

        Args:
            update: The numbers of the step.
        """

    def on_rows(self, rows: list[Row]) -> None:
        """Called with the rows of metrics.jsonl for an interval of `log_every` steps.

        The interval may be shorter before a checkpoint or the end of the run.

        Args:
            rows: The rows, in order.
        """

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """Called with the results of an evaluation.

        Args:
            index: Number of finished steps.
            metrics: {name: value}, with the names in evaluations.jsonl.
        """

    def on_end(self, status: str) -> None:
        """Called at the end of the run, also after an error.

        Args:
            status: How the run ended, such as "done" or "failed".
        """

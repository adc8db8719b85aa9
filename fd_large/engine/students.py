"""Trains several students in lockstep: each batch is read and passes the frozen models once.

Each student has its own engine, hooks and checkpoints, and computes the same numbers as if it were
trained alone. A run with a single student uses the same code. A student that is behind after a
resume from an older checkpoint trains until it has caught up, while the others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fd_large.data.loader import Batch
from fd_large.engine.evaluation import Interrupted
from fd_large.engine.forward_backward import completed
from fd_large.engine.loop import Trainer
from fd_large.engine.memory import kept_from_children
from fd_large.engine.prefetch import Batches, Prefetch, StepForSeveral
from fd_large.engine.zero import state
from fd_large.ranks import distributed
from fd_large.runtime.hooks import PREEMPTED, Hook, Setting, Update, Wish


class HooksOfAll(Hook):
    """Combines the hooks of this process into one hook, which each student's run calls.

    `on_start` and `on_end` of the given hooks are called once for all students, and `after_update`
    once for each step, when the first student has taken the step. So the time between two calls is
    the time that all students take for a step. The hooks' verdicts on steps are ignored.
    """

    def __init__(self, hooks: Sequence[Hook]) -> None:
        self._hooks, self._last = hooks, -1

    def begin(self, settings: Sequence[Setting], folder: Path) -> None:
        """Calls the hooks' `on_start` with facts about the runs of all students.

        `folder` is the folder that this launch of the run owns.
        """
        whole = replace(
            settings[0],
            folder=folder,
            first_update=min(setting.first_update for setting in settings),
            total_updates=max(setting.total_updates for setting in settings),
            checkpoint_bytes=sum(setting.checkpoint_bytes for setting in settings),
        )
        for hook in self._hooks:
            hook.on_start(whole)

    def end(self, status: str) -> None:
        """Calls the hooks' `on_end` with `status` when the runs of all students have ended."""
        for hook in self._hooks:
            hook.on_end(status)

    def wish(self) -> Wish:
        """Returns the requests to stop and to save, each True if any hook makes the request."""
        wishes = [hook.wish() for hook in self._hooks]
        return Wish(any(wish.stop for wish in wishes), any(wish.save for wish in wishes))

    def after_update(self, update: Update) -> None:
        """Passes the update of the first student that takes a step on to each hook."""
        if update.index > self._last:
            self._last = update.index
            for hook in self._hooks:
                hook.after_update(update)

    def beat(self, *_: object, **__: object) -> None:
        """Tells each hook that the run makes progress."""
        for hook in self._hooks:
            hook.beat()

    on_skip = on_roll_back = on_save = beat

    def on_stop(self) -> None:
        """Passes the call on to each hook."""
        for hook in self._hooks:
            hook.on_stop()

    def on_saved(self, seconds: float) -> None:
        """Passes the call on to each hook."""
        for hook in self._hooks:
            hook.on_saved(seconds)

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """Passes the call on to each hook."""
        for hook in self._hooks:
            hook.on_evaluation(index, metrics)


def train_together(
    trainers: Sequence[Trainer], batches: Callable[[int, int], Iterator[Batch]]
) -> list[str]:
    """Trains each student from its present step to its end; returns the students' statuses.

    The students share seed, images and batch sizes. If a student stops because the process has to
    end, all students stop after the same step.

    Args:
        trainers: A trainer for each student.
        batches: Function of an epoch and the index of a step in the epoch. Returns this rank's
            micro batches from that step to the epoch's end. A call may take long, and may raise
            Interrupted on all ranks.
    """
    try:
        for trainer in trainers:
            trainer.begin()
        _leave_together(trainers)
        while going := [trainer for trainer in trainers if not trainer.status]:
            _train_epoch(trainers, min(trainer.finished for trainer in going), batches)
        return [trainer.end() for trainer in trainers]
    finally:
        for trainer in trainers:
            trainer.give_up()


def _train_epoch(
    trainers: Sequence[Trainer], finished: int, batches: Callable[[int, int], Iterator[Batch]]
) -> None:
    """Trains from step `finished`, that of the students furthest behind, to the end of its epoch.

    Training ends earlier when no student can take the next step, since each student has stopped or
    is at a later step.
    """
    epoch, first = divmod(finished, trainers[0].steps_per_epoch)
    end = finished - first + trainers[0].steps_per_epoch
    try:
        written = (tensor for trainer in trainers for tensor in state.written(trainer.engine))
        with kept_from_children(written):
            micro_batches = Prefetch(iter(batches(epoch, first)), distributed.device())
    except Interrupted:
        for trainer in trainers:
            trainer.leave()
        return
    while turn := [t for t in trainers if t.finished == finished < end and not t.status]:
        _step_each(turn, micro_batches, epoch)
        _leave_together(trainers)
        finished += 1
    # Runs the loader dry, so that its workers have ended before the next epoch's are forked.
    if finished == end:
        left = next(micro_batches, None)
        assert left is None


def _step_each(trainers: Sequence[Trainer], micro_batches: Batches, epoch: int) -> None:
    if len(trainers) == 1:
        trainers[0].take_step(micro_batches, epoch)
        return
    task = trainers[0].task
    shared = StepForSeveral(micro_batches, lambda batch: completed(task, batch), len(trainers))
    for trainer in trainers:
        shared.rewind()
        trainer.take_step(shared, epoch)


def _leave_together(trainers: Sequence[Trainer]) -> None:
    if any(trainer.status == PREEMPTED for trainer in trainers):
        for trainer in trainers:
            trainer.leave()

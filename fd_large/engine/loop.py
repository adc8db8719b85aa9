"""Trains any task by a loop of steps, calls hooks, evaluates, and writes checkpoints."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fd_large.data.bad_images import BadCount, BadImages, agreed_error
from fd_large.data.loader import Batch
from fd_large.engine.best import Best
from fd_large.engine.checkpoints import Checkpoints
from fd_large.engine.ema import Ema
from fd_large.engine.evaluation import Evaluation, Interrupted, Panel, Pending
from fd_large.engine.forward_backward import arguments_of_step, backward
from fd_large.engine.incident_evidence import evidence_of
from fd_large.engine.memory import out_of_memory_named
from fd_large.engine.prefetch import Batches
from fd_large.engine.schedule import Schedule
from fd_large.engine.task import Task
from fd_large.engine.zero.engine import Engine
from fd_large.engine.zero.layer_decay import LayerLearningRates
from fd_large.engine.zero.optimizer import set_learning_rate
from fd_large.engine.zero.step_gate import Answer
from fd_large.errors import FDError
from fd_large.ranks import activity, distributed
from fd_large.runtime import step_clock
from fd_large.runtime.hooks import (
    DONE,
    GUARD,
    NOT_SAVED,
    PREEMPTED,
    Hook,
    Setting,
    Update,
    Verdict,
)

log = logging.getLogger(__name__)


class TrainingPlan(NamedTuple):
    """Length, batches and learning rates of a run.

    Attributes:
        schedule: The learning rates; its total is the run's length.
        steps_per_epoch: Number of steps in an epoch, one for each full global batch.
        accumulation: Micro batches of a rank per step.
        seed: Seed of the drop path.
        max_bad_fraction: Fraction of the images that may be unusable before the run stops.
        count_bad_every: Steps between two sums of the unusable images over all ranks.
    """

    schedule: Schedule
    steps_per_epoch: int
    accumulation: int
    seed: int
    max_bad_fraction: float = 1.0
    count_bad_every: int = 20


@dataclass
class _Passed:
    """Results of the forward and backward passes of a step on this rank.

    Attributes:
        batches: The micro batches.
        losses: Their losses, on the device.
        waited: Seconds that the rank waited for the micro batches.
    """

    batches: list[Batch] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    waited: float = 0.0


class _Agreed(NamedTuple):
    """Facts about a step that are the same on all ranks before the optimiser steps.

    Attributes:
        update: The step's numbers, for the hooks.
        stop: Whether a hook of any rank asks to stop.
        save: Whether a hook of any rank asks to save a checkpoint.
        busy: Whether any rank is still writing a checkpoint.
        failed: Whether any rank failed to write a checkpoint.
        broken: Whether any rank failed to write a checkpoint because its state is not finite.
        scored: Whether rank 0 has finished the metrics of a pending evaluation.
        verdict: The hooks' decision about the step.
    """

    update: Update
    stop: bool
    save: bool
    busy: bool
    failed: bool
    broken: bool
    scored: bool
    verdict: Verdict


class Trainer:
    """Trains one run from its present step to its end.

    Args:
        engine: The task in its engine.
        plan: Length, batches and learning rates.
        hooks: Observers of the run, in the order in which they are called.
        setting: Facts that the hooks get before the first step.
        checkpoints: The run's checkpoints; a resumed run has restored its state from them.
        evaluations: Measurements before, during and after training.
        layer_rates: Steps each layer at its own learning rate; None if all layers have the same.
        ema: Moving average of the weights, or None.
        best: Finds the best evaluation, whose checkpoint is then kept, and may end the run early.
            With None, the run keeps no best checkpoint and never ends early.
        begun: List to which each hook is appended after its `on_start` has returned; the caller
            tells these hooks of an error that ends the run.

    Attributes:
        stopped_early: Whether the run ended before its last step because patience was exhausted.
    """

    def __init__(
        self,
        engine: Engine,
        plan: TrainingPlan,
        hooks: Sequence[Hook],
        setting: Setting,
        *,
        checkpoints: Checkpoints,
        evaluations: Sequence[Evaluation] = (),
        layer_rates: LayerLearningRates | None = None,
        ema: Ema | None = None,
        best: Best | None = None,
        begun: list[Hook] | None = None,
    ) -> None:
        self.engine, self._plan, self._hooks, self.setting = engine, plan, hooks, setting
        self._checkpoints, self._evaluations = checkpoints, evaluations
        self._layer_rates, self._ema, self.best = layer_rates, ema, best
        self._finished = setting.first_update
        self._begun = [] if begun is None else begun
        self._status = ""
        self._save_owed = False
        # Whether the last step moved the weights on, and no roll-back undid it.
        self._moved_on = True
        self._bad_images, self._bad_before = BadImages(), checkpoints.bad_images
        self._improved = self.stopped_early = False
        # The evaluation that is pending, if any, after the number of steps that preceded it.
        self._pending: tuple[int, Pending] | None = None

    @property
    def finished(self) -> int:
        """Number of finished steps."""
        return self._finished

    @property
    def status(self) -> str:
        """Status with which the run ends (`done` after its last step), or "" while it trains."""
        return self._status or (DONE if self._finished >= self._total else "")

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch, one for each full global batch."""
        return self._plan.steps_per_epoch

    @property
    def task(self) -> Task:
        """The trained Module."""
        return self.engine.task

    def begin(self) -> None:
        """Starts the hooks, and makes the evaluation that is due before the next step, if any.

        It is due before the first step of a run, and in a resumed run if the earlier launch of the
        run did not finish it.
        """
        with activity.work("opening logs and trackers"):
            for hook in self._hooks:
                hook.on_start(self.setting)
                self._begun.append(hook)
        self.engine.task.train()
        if self._finished:
            for evaluation in self._evaluations:
                again = not self._checkpoints.evaluated
                self._pending = self._pending or evaluation.left(self._finished, again)
        if self._stop_wished():
            self._stop()
        elif self._finished == 0:
            self._evaluate(last=False)
        elif not self._checkpoints.evaluated and self._evaluate(last=self._finished == self._total):
            # The last start did not begin, or did not finish, this evaluation.
            self._checkpoints.mark_evaluated()
            self._after_evaluation(saved=True)
        elif self.best is not None and self.best.exhausted:
            # The last start ended after the evaluation that exhausted patience, before it stopped.
            self._after_evaluation(saved=True)

    def leave(self) -> None:
        """Saves and stops after the present step, because another student's run has stopped."""
        if self.status:
            return
        self._stop()
        if self._finished > self.setting.first_update:
            self._save(evaluated=True)

    def end(self) -> str:
        """Waits for the checkpoint and for pending metrics, ends the hooks, and returns the status.

        A preempted run does not wait for pending metrics. The status is `done`, `preempted`, `not
        saved`, or that of the hook that ended the run.
        """
        with activity.work("writing the checkpoint"):
            saved = self._checkpoints.settle()
        # A preempted run does not wait for pending numbers; the next start takes them up.
        if self._status != PREEMPTED:
            self._take_numbers(self._beat)
        status = self.status
        if not saved and status in (DONE, PREEMPTED):
            status = NOT_SAVED
        for hook in self._hooks:
            hook.on_end(status)
        return status

    def give_up(self) -> None:
        """Leaves pending evaluations, if any, to a later launch of the run."""
        if self._pending is not None:
            self._pending[1].give_up()

    @property
    def _total(self) -> int:
        return self._plan.schedule.total

    def take_step(self, micro_batches: Batches, epoch: int) -> None:
        """Takes one step, then calls the hooks, and rolls back, saves and evaluates if due."""
        passed = self._forward_backward(micro_batches)
        agreed = self._step_agreed(passed, epoch, micro_batches.students)
        update, verdict = agreed.update, agreed.verdict
        self._finished += 1
        if agreed.scored:
            with step_clock.standing():
                self._take_numbers(self._beat)
        self._report_saved(
            self._checkpoints.after_update(
                busy_anywhere=agreed.busy,
                failed_anywhere=agreed.failed,
                broken_anywhere=agreed.broken,
            )
        )
        if update.skipped:
            values = torch.stack(passed.losses).tolist()
            evidence = evidence_of(self.engine, passed.batches, values, self._plan.seed)
            for hook in self._hooks:
                hook.on_skip(update, evidence)
        verdict = Verdict.all_of([verdict, *(h.after_update(update) for h in self._hooks)])
        if agreed.broken and verdict.roll_back is None and not verdict.stop:
            if distributed.is_main():
                log.error(
                    "the run ends: its weights or moments are not finite, and no run can resume "
                    "from such numbers. Start the same command again to resume from the last "
                    "checkpoint. With --guard.enabled True a run rolls back by itself."
                )
            verdict = replace(verdict, stop=GUARD)
        if verdict.stop:
            self._status = verdict.stop
            return
        rolled_back = verdict.roll_back is not None and self._roll_back(update, verdict.roll_back)
        if self._status:
            return
        self._moved_on = not (update.skipped or rolled_back)
        self._save_and_evaluate(agreed, rolled_back)

    def _forward_backward(self, micro_batches: Batches) -> _Passed:
        """Runs forward and backward of the micro batches of a step."""
        engine, plan = self.engine, self._plan
        passed = _Passed()

        def fetched() -> Iterator[Batch]:
            for _ in range(plan.accumulation):
                self._beat()
                begin = time.perf_counter()
                batch, on_device = next(micro_batches)
                passed.waited += time.perf_counter() - begin
                self._bad_images.add(len(batch.positions), batch.bad)
                passed.batches.append(batch)
                yield micro_batches.completed(on_device)
                # Once the batch's work is queued, and before the host waits in `_agree`.
                begin = time.perf_counter()
                micro_batches.stage()
                passed.waited += time.perf_counter() - begin

        engine.task.before_step(self._finished / self._total)
        with out_of_memory_named(self.setting.micro_batch_size):
            for arguments in arguments_of_step(
                engine.task, engine.deepspeed, fetched(), plan.seed, count=plan.accumulation
            ):
                self._beat()
                passed.losses.append(backward(engine, arguments))
                if len(passed.losses) < plan.accumulation:
                    engine.deepspeed.step()
        return passed

    def _step_agreed(self, passed: _Passed, epoch: int, students: int) -> _Agreed:
        """Lets the ranks agree on the step, then steps the optimiser unless the step is skipped.

        `students` is the number of students that take the step together. Returns the agreed facts,
        with the step's final numbers in `update`.
        """
        engine, schedule, size = self.engine, self._plan.schedule, len(passed.batches[-1].positions)
        learning_rate = schedule.at_step(self._finished)
        set_learning_rate(engine.deepspeed.optimizer, learning_rate)
        if self._layer_rates is not None:
            self._layer_rates.at_scale = partial(schedule.scaled_at, self._finished)
        agreements: list[_Agreed] = []

        def ask(norm: Tensor | None) -> Answer:
            agreed = self._agree(passed.losses, epoch, learning_rate, norm)
            agreements.append(agreed)
            finite = norm is None or agreed.update.grad_norm < math.inf
            return Answer(goes_on=finite and not agreed.verdict.skip, finite=finite)

        with out_of_memory_named(size):
            moved = engine.gate.step(engine.deepspeed, ask)
        (agreed,) = agreements
        self._checkpoints.optimizer_steps += moved
        if moved:
            engine.task.after_step()
            if self._ema is not None:
                self._ema.update()
        side = passed.batches[-1].images.shape[-1]
        update = replace(
            agreed.update,
            skipped=not moved,
            data_seconds=passed.waited,
            students=students,
            image_size=side if self.setting.image_sizes else 0,
        )
        return agreed._replace(update=update)

    def _agree(
        self, losses: list[Tensor], epoch: int, learning_rate: float, norm: Tensor | None
    ) -> _Agreed:
        """Lets the ranks decide on a step by one collective, whose result the host reads once.

        `losses` are those of this rank's micro batches, and `norm` is that of the gradients before
        clipping. If it is None, as at stage 0, an attribute of DeepSpeed's optimiser has it.
        """
        wishes = [hook.wish() for hook in self._hooks]
        own_flags = [
            any(wish.stop for wish in wishes),
            any(wish.save for wish in wishes),
            *self._checkpoints.flags,
            self._pending is not None and self._pending[1].done,
        ]
        device = distributed.device()
        loss = torch.stack(losses).mean().double().reshape(1)
        flags = torch.tensor(own_flags, dtype=torch.float64).to(device, non_blocking=True)
        # The norm is the same on all ranks, but for the last digit between unlike processors.
        own_norm = self.engine.deepspeed.optimizer._global_grad_norm if norm is None else norm
        own_norm = torch.as_tensor(own_norm, dtype=torch.float64, device=device).reshape(1)
        summed = distributed.sum_tensor(torch.cat([loss, own_norm, flags])).tolist()
        loss_mean, norm_mean, *counts = (total / distributed.world_size() for total in summed)
        if norm is not None and not 0 <= norm_mean < math.inf:
            norm_mean = math.inf  # DeepSpeed's -1 too.
        update = Update(self._finished, epoch, loss_mean, norm_mean, learning_rate)
        verdict = Verdict.all_of(hook.judge(update) for hook in self._hooks)
        agreed = _Agreed(update, *(count > 0 for count in counts), verdict=verdict)
        # After a state that is not finite, no later state could be saved either.
        return agreed._replace(verdict=replace(verdict, skip=verdict.skip or agreed.broken))

    def _roll_back(self, update: Update, at_most: int) -> bool:
        """Restores the newest sound checkpoint of at most `at_most` steps; returns whether it did.

        If there is no such checkpoint, the run ends. `update` has the numbers of the step that is
        rolled back, for the hooks.
        """
        restored = self._checkpoints.roll_back(at_most)
        if restored is None:
            if distributed.is_main():
                log.error(
                    "the run ends: no sound checkpoint of at most %d steps to roll back to. Start "
                    "over (--fresh) with a lower --optim.base_lr, or save more often "
                    "(--runtime.save_every).",
                    at_most,
                )
            self._status = GUARD
            return False
        for hook in self._hooks:
            hook.on_roll_back(update, restored)
        return True

    def _save_and_evaluate(self, agreed: _Agreed, rolled_back: bool) -> None:
        plan, finished = self._plan, self._finished
        last = finished == self._total
        if agreed.stop:
            self._stop()
        evaluates = any(evaluation.due(finished, last) for evaluation in self._evaluations)
        too_bad = None
        if last or finished % plan.count_bad_every == 0:
            too_bad = agreed_error(self._count_bad(), plan.max_bad_fraction, self._bad_images.names)
        self._save_owed |= agreed.save or self._checkpoints.due(finished, plan.steps_per_epoch)
        # Not in a row of refused steps, which may be rolled back to the last good checkpoint.
        due = self._save_owed and not agreed.update.skipped
        saves = bool(self._status or last or due or too_bad or rolled_back)
        # Before the evaluation: if it fails on any rank, no step is lost, and the next start
        # makes the evaluation again.
        if saves:
            self._save(evaluated=not evaluates, counts_anew=too_bad is not None)
        if too_bad:
            self._checkpoints.settle()
            raise too_bad
        if not evaluates or self._status:
            return
        if last:
            with step_clock.standing():
                self._checkpoints.settle()
        if self._evaluate(last=last):
            if saves:
                self._checkpoints.mark_evaluated()
            # A state within a row of refused steps is never kept as the best.
            if not agreed.update.skipped:
                self._after_evaluation(saved=saves)
        elif not saves:
            self._save(evaluated=False)

    def _count_bad(self) -> BadCount:
        """Returns the run's numbers of unusable and of tried images so far, over all ranks."""
        counts = distributed.sum_tensor(torch.tensor(self._bad_images.count)).tolist()
        return BadCount(*map(sum, zip(counts, self._bad_before, strict=True)))

    def _after_evaluation(self, *, saved: bool) -> None:
        """Keeps this step's checkpoint if the step's evaluation is the best so far.

        If patience is exhausted, the run ends. In a run that keeps no best checkpoint, nothing is
        done. `saved` tells whether a checkpoint of this step is stored or being written.
        """
        best = self.best
        if best is None or self._status:
            return
        stops = best.exhausted and self._finished < self._total
        if (self._improved or stops) and not saved:
            self._save(evaluated=True)
            if self._status:
                return
        if self._improved:
            self._checkpoints.mark_best(self._finished)
        if stops:
            self.stopped_early = True
            if distributed.is_main():
                log.info("%s", best.reason())
            self._plan = self._plan._replace(
                schedule=replace(self._plan.schedule, total=self._finished)
            )
            with step_clock.standing():
                self._checkpoints.settle()
            # As after the last step: with the figures and pictures that only the last one has.
            self._evaluate(last=True)

    @step_clock.standing()
    def _save(self, *, evaluated: bool, counts_anew: bool = False) -> None:
        """Starts to write a checkpoint of the present step.

        Args:
            evaluated: Whether the evaluation that is due, if any, was made.
            counts_anew: Whether a run that resumes from this checkpoint counts unusable images from
                zero, because the present launch of the run has already reported them.
        """
        verdict = Verdict.all_of(hook.on_save(self._finished) for hook in self._hooks)
        if verdict.stop:
            self._status = verdict.stop
            return
        self._save_owed = False
        self._checkpoints.bad_images = BadCount(0, 0) if counts_anew else self._count_bad()
        # Older checkpoints stay after a refused step: the run may be rolled back to one of them.
        seconds = self._checkpoints.save(self._finished, evaluated=evaluated, prunes=self._moved_on)
        self._report_saved(seconds)

    @step_clock.standing()
    def _evaluate(self, *, last: bool) -> bool:
        """Makes the evaluations that are due.

        `last` tells whether the run has made its last step. Returns True, or False if the
        evaluations were interrupted because a hook asked to stop.
        """
        due = [item for item in self._evaluations if item.due(self._finished, last)]
        if not due:
            return True
        # The run ends, or what it does next follows from the numbers.
        waits = bool(last or self.best)
        metrics: dict[str, float] = {}
        panel: Panel | None = None
        try:
            self._take_numbers(self.between_batches)
            # With the average of the weights where there is one.
            average = self._ema.in_place_of_weights() if self._ema else nullcontext()
            with activity.work("evaluation"), average:
                for evaluation in due:
                    result, shown = evaluation.measure(self._finished, last, self.between_batches)
                    panel = panel or shown
                    if isinstance(result, dict):
                        metrics |= result
                        continue
                    self._pending = self._finished, result
                    if waits:
                        metrics |= result.wait(self.between_batches)
        except Interrupted:
            self._stop()
            return False
        if self.best is not None:
            all_made = len(due) == len(self._evaluations)
            self._improved = self.best.note(self._finished, metrics, all_made=all_made)
        for hook in self._hooks if metrics else ():
            hook.on_evaluation(self._finished, metrics)
            if panel is not None:
                hook.on_features(self._finished, panel)
        if waits and self._pending is not None:
            self._pending[1].forget()
            self._pending = None
        return True

    def _take_numbers(self, meanwhile: Callable[[], None]) -> None:
        """Waits for a pending evaluation, if any, and passes its metrics to the hooks.

        `meanwhile` is called repeatedly; an error that it raises ends the wait.
        """
        if self._pending is None:
            return
        step, pending = self._pending
        try:
            with activity.work(f"waiting for the numbers of step {step}"):
                metrics = pending.wait(meanwhile)
        except FDError as error:
            # Nothing follows from them; the next start tries again.
            if distributed.is_main():
                log.error("NO RESULT of the evaluation after %d steps: %s", step, error)
        else:
            if self.best is not None:
                self.best.note(step, metrics, all_made=False)
            for hook in self._hooks:
                hook.on_evaluation(step, metrics)
            pending.forget()
        self._pending = None

    def between_batches(self) -> None:
        """Reports progress by the hooks' `beat`, and lets the run stop if a hook asks to stop.

        All ranks must call this method between the batches of work that is not a training step.

        Raises: Interrupted: on all ranks, if a hook of any rank asks to stop.
        """
        self._beat()
        if self._stop_wished():
            raise Interrupted

    def _stop(self) -> None:
        self._status = PREEMPTED
        for hook in self._hooks:
            hook.on_stop()

    def _stop_wished(self) -> bool:
        return distributed.any_rank(any(hook.wish().stop for hook in self._hooks))

    def _beat(self) -> None:
        for hook in self._hooks:
            hook.beat()

    def _report_saved(self, seconds: float | None) -> None:
        if seconds is not None:
            for hook in self._hooks:
                hook.on_saved(seconds)

"""The trainer: batches in, steps out, hooks asked, checkpoints written. It knows no task."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fd_large import distributed
from fd_large.data.bad_images import BadCount, BadImages, limit_error, past_limit
from fd_large.data.loader import Batch
from fd_large.engine.checkpoints import Checkpoints
from fd_large.engine.ema import Ema
from fd_large.engine.evaluation import Evaluation, Interrupted, Panel, steps_between
from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.incident_evidence import evidence_of
from fd_large.engine.micro_batch import out_of_memory_named
from fd_large.engine.prefetch import Prefetch
from fd_large.engine.schedule import CosineSchedule
from fd_large.engine.time_box import TimeBox
from fd_large.engine.zero.engine import Engine
from fd_large.engine.zero.layer_decay import LayerRates
from fd_large.engine.zero.optimizer import set_rate
from fd_large.errors import DataError
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


class Plan(NamedTuple):
    """In what portions and at which rates a run trains.

    Attributes:
        schedule: Learning rates; its total is the run's length.
        updates_per_epoch: Whole global batches in an epoch.
        accumulation: Micro batches per step.
        seed: Of order, crops and drop path.
        max_bad_fraction: Of images that may be bad before the run stops.
        count_bad_every: Steps between two looks at the sum over ranks.
    """

    schedule: CosineSchedule
    updates_per_epoch: int
    accumulation: int
    seed: int
    max_bad_fraction: float = 1.0
    count_bad_every: int = 20


class _Agreed(NamedTuple):
    """What the ranks know together before the optimiser moves."""

    update: Update
    stop: bool
    save: bool
    busy: bool
    failed: bool
    verdict: Verdict


class Trainer:
    """Trains one run from where it stands to its end.

    Args:
        engine: The task in its engine.
        plan: Rates and portions.
        hooks: Asked around every step.
        setting: Told to the hooks.
        checkpoints: Asked when to save, and told what the ranks agreed.
        evaluations: What is measured before, during and after training.
        time_box: Decides the length after the first steps.
        layer_rates: Steps each layer at its own rate; None: all at one.
        ema: Follows the weights.
    """

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        hooks: Sequence[Hook],
        setting: Setting,
        *,
        checkpoints: Checkpoints,
        evaluations: Sequence[Evaluation] = (),
        time_box: TimeBox | None = None,
        layer_rates: LayerRates | None = None,
        ema: Ema | None = None,
    ) -> None:
        self._engine, self._plan, self._hooks, self._setting = engine, plan, hooks, setting
        self._checkpoints, self._evaluations, self._time_box = checkpoints, evaluations, time_box
        self._layer_rates, self._ema = layer_rates, ema
        self._update = setting.first_update
        self._status = ""
        self._owed = False
        self._bad_images = BadImages()

    def train(self, batches: Callable[[int, int], Iterator[Batch]]) -> str:
        """Trains; returns `done`, `preempted`, `not saved`, or the status a hook ended it with.

        Args:
            batches: (epoch, first step of it) -> this rank's micro batches to the epoch's end.
        """
        for hook in self._hooks:
            hook.on_start(self._setting)
        self._engine.task.train()
        if self._stop_wished():
            self._status = PREEMPTED
        elif self._update == 0:
            self._evaluated(last=False)
        elif not self._checkpoints.evaluated:
            # The evaluation that a pre-emption cut short.
            self._evaluated(last=self._update == self._total)
        while self._update < self._total and not self._status:
            self._epoch(batches)
        saved = self._checkpoints.settle()
        status = self._status or DONE
        if not saved and status in (DONE, PREEMPTED):
            status = NOT_SAVED
        for hook in self._hooks:
            hook.on_end(status)
        return status

    @property
    def _total(self) -> int:
        return self._plan.schedule.total

    def _epoch(self, batches: Callable[[int, int], Iterator[Batch]]) -> None:
        epoch, first = divmod(self._update, self._plan.updates_per_epoch)
        end = min((epoch + 1) * self._plan.updates_per_epoch, self._total)
        micro_batches = Prefetch(iter(batches(epoch, first)), distributed.device())
        while self._update < min(end, self._total) and not self._status:
            self._one_update(micro_batches, epoch)
        # Runs the loader dry, so that its workers have ended before the next epoch's are forked.
        if not self._status and self._update % self._plan.updates_per_epoch == 0:
            left = next(micro_batches, None)
            assert left is None

    def _one_update(self, micro_batches: Prefetch, epoch: int) -> None:
        agreed, batches, losses = self._stepped(micro_batches, epoch)
        finished, verdict = agreed.update, agreed.verdict
        self._update += 1
        seconds = self._checkpoints.after_update(
            busy_anywhere=agreed.busy, failed_anywhere=agreed.failed
        )
        if seconds is not None:
            self._tell_saved(seconds)
        if finished.skipped:
            numbers = torch.stack(losses).tolist()
            evidence = evidence_of(self._engine, batches, numbers, self._plan.seed)
            for hook in self._hooks:
                hook.on_skip(finished, evidence)
        if self._time_box is not None and (total := self._time_box.after_update()) is not None:
            self._plan = self._plan._replace(schedule=replace(self._plan.schedule, total=total))
            finished = replace(finished, total=total)
        verdict = Verdict.all_of([verdict, *(h.after_update(finished) for h in self._hooks)])
        if verdict.stop:
            self._status = verdict.stop
            return
        rolled_back = verdict.roll_back is not None and self._roll_back(finished, verdict.roll_back)
        if self._status:
            return
        self._evaluate_and_save(agreed, rolled_back)

    def _evaluate_and_save(self, agreed: _Agreed, rolled_back: bool) -> None:
        plan, update = self._plan, self._update
        last = update == self._total
        if agreed.stop:
            self._status = PREEMPTED
        evaluated = True
        # Before the checkpoint: a resume does not evaluate again.
        every = steps_between(self._evaluations)
        if last or (every and update % every == 0):
            evaluated = not agreed.stop and self._evaluated(last=last)
        too_bad = None
        if last or update % plan.count_bad_every == 0:
            too_bad = _too_many_bad(self._bad_images, plan.max_bad_fraction)
        self._owed |= agreed.save or self._checkpoints.due(update, plan.updates_per_epoch)
        # Not in a row of refused steps: a good checkpoint is what they may be rolled back to.
        due = self._owed and not agreed.update.skipped
        if self._status or last or due or too_bad or rolled_back:
            self._save(evaluated=evaluated)
        if too_bad:
            self._checkpoints.settle()
            raise too_bad

    def _save(self, *, evaluated: bool) -> None:
        verdict = Verdict.all_of(hook.on_save(self._update) for hook in self._hooks)
        if verdict.stop:
            self._status = verdict.stop
            return
        self._owed = False
        self._tell_saved(self._checkpoints.save(self._update, evaluated=evaluated))

    def _stepped(
        self, micro_batches: Prefetch, epoch: int
    ) -> tuple[_Agreed, list[Batch], list[Tensor]]:
        """Forward, backward, agreement, and the step unless it is refused."""
        engine, plan = self._engine, self._plan
        rate = plan.schedule.at_update(self._update)
        set_rate(engine.deepspeed.optimizer, rate)
        if self._layer_rates is not None:
            self._layer_rates.rate_of = partial(plan.schedule.scaled_at, self._update)
        batches: list[Batch] = []
        losses: list[Tensor] = []
        waited = 0.0
        for portion in range(plan.accumulation):
            self._beat()
            begin = time.perf_counter()
            batch, on_device = next(micro_batches)
            waited += time.perf_counter() - begin
            self._bad_images.add(len(batch.positions), batch.bad)
            batches.append(batch)
            with out_of_memory_named(len(batch.positions)):
                losses.append(forward_backward(engine, on_device, plan.seed))
                if portion < plan.accumulation - 1:
                    engine.deepspeed.step()
            # Before the host waits for the device in `_agree`.
            begin = time.perf_counter()
            micro_batches.stage()
            waited += time.perf_counter() - begin
        agreements: list[_Agreed] = []

        def ask() -> bool:
            agreements.append(self._agree(losses, epoch, rate))
            return not agreements[0].verdict.skip

        with out_of_memory_named(len(batches[-1].positions)):
            moved = engine.gate.step(engine.deepspeed, ask)
        # DeepSpeed refuses a norm that is not finite by itself.
        agreed = agreements[0] if agreements else self._agree(losses, epoch, rate)
        self._checkpoints.optimizer_steps += moved
        if moved and self._ema is not None:
            self._ema.update()
        update = replace(agreed.update, skipped=not moved, data_seconds=waited)
        return agreed._replace(update=update), batches, losses

    def _agree(self, losses: list[Tensor], epoch: int, rate: float) -> _Agreed:
        """The one collective and the one host read of a step."""
        # Before clipping.
        norm = self._engine.deepspeed.optimizer._global_grad_norm
        wishes = [hook.wish() for hook in self._hooks]
        flags = [
            any(wish.stop for wish in wishes),
            any(wish.save for wish in wishes),
            *self._checkpoints.flags,
        ]
        device = distributed.device()
        loss = torch.stack(losses).mean().double().reshape(1)
        told = torch.tensor(flags, dtype=torch.float64).to(device, non_blocking=True)
        # The norm is the same on all ranks, but for the last digit between unlike processors.
        norm = torch.as_tensor(norm, dtype=torch.float64, device=device).reshape(1)
        summed = distributed.sum_tensor(torch.cat([loss, norm, told])).tolist()
        loss_sum, norm_sum, *agreed = summed
        ranks = distributed.world_size()
        update = Update(self._update, self._total, epoch, loss_sum / ranks, norm_sum / ranks, rate)
        verdict = Verdict.all_of(hook.judge(update) for hook in self._hooks)
        return _Agreed(update, *(count > 0 for count in agreed), verdict=verdict)

    def _roll_back(self, update: Update, at_most: int) -> bool:
        restored = self._checkpoints.roll_back(at_most)
        if restored is None:
            # One of this row, by a pre-emption in it: no weight has moved since it began.
            restored = self._checkpoints.roll_back(self._update)
        if restored is None:
            if distributed.is_main():
                log.error(
                    "no checkpoint of at most %d steps to go back to: the run ends. Start it "
                    "anew (--fresh) with a lower --optim.base_lr, or save more often "
                    "(--runtime.save_every).",
                    at_most,
                )
            self._status = GUARD
            return False
        for hook in self._hooks:
            hook.on_roll_back(update, restored)
        return True

    def _evaluated(self, *, last: bool) -> bool:
        """Makes the evaluations that are due; says whether they came to their end."""
        due = [one for one in self._evaluations if one.due(self._update, last)]
        if not due:
            return True
        begin = time.monotonic()
        metrics: dict[str, float] = {}
        panel: Panel | None = None
        try:
            # With the average of the weights where there is one.
            with self._ema.in_place_of_weights() if self._ema else nullcontext():
                for evaluation in due:
                    found, shown = evaluation.measure(self._update, last, self._between_batches)
                    metrics |= found
                    panel = panel or shown
        except Interrupted:
            self._status = PREEMPTED
            return False
        if self._time_box is not None:
            self._time_box.after_evaluation(time.monotonic() - begin)
        for hook in self._hooks if metrics else ():
            hook.on_evaluation(self._update, metrics)
            if panel is not None:
                hook.on_features(self._update, panel)
        return True

    def _between_batches(self) -> None:
        self._beat()
        if self._stop_wished():
            raise Interrupted

    def _stop_wished(self) -> bool:
        return distributed.any_rank(any(hook.wish().stop for hook in self._hooks))

    def _beat(self) -> None:
        for hook in self._hooks:
            hook.beat()

    def _tell_saved(self, seconds: float | None) -> None:
        if seconds is not None:
            for hook in self._hooks:
                hook.on_saved(seconds)


def _too_many_bad(bad_images: BadImages, max_bad_fraction: float) -> DataError | None:
    """The error that ends the run, the same on every rank, or None."""
    count = BadCount(*distributed.sum_tensor(torch.tensor(bad_images.count)).tolist())
    if not past_limit(count, max_bad_fraction):
        return None
    names = [name for mine in distributed.gather_objects(bad_images.names) for name in mine]
    error = limit_error(count, max_bad_fraction, names)
    error.agreed = True
    return error

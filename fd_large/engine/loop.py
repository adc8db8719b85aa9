"""The trainer: batches in, updates out, hooks asked, checkpoints written. It knows no teacher."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fd_large import distributed
from fd_large.data.bad import BadCount, BadPictures, limit_error, past_limit
from fd_large.data.draws import drop_path_keep
from fd_large.data.loader import Batch
from fd_large.engine.build import Engine
from fd_large.engine.checkpoints import Checkpoints
from fd_large.engine.micro_batch import out_of_memory_named
from fd_large.engine.optimizer import set_rate
from fd_large.engine.schedule import CosineSchedule
from fd_large.engine.time_box import TimeBox
from fd_large.errors import DataError
from fd_large.runtime.hooks import Hook, Setting, Update

log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """In what portions and at which rates a run trains.

    Attributes:
        schedule: Learning rates; its total is the run's length.
        updates_per_epoch: Whole global batches in an epoch.
        accumulation: Micro batches per update.
        seed: Of order, crops and drop path.
        evaluate_every: Updates between evaluations; 0: only before the first and after the last.
        max_bad_fraction: Of pictures that may be bad before the run stops.
        count_bad_every: Updates between two looks at the sum over ranks.
    """

    schedule: CosineSchedule
    updates_per_epoch: int
    accumulation: int
    seed: int
    evaluate_every: int = 0
    max_bad_fraction: float = 1.0
    count_bad_every: int = 20


def train_updates(
    engine: Engine,
    batches: Callable[[int, int], Iterator[Batch]],
    plan: Plan,
    hooks: Sequence[Hook],
    setting: Setting,
    *,
    checkpoints: Checkpoints,
    evaluate: Callable[[int, bool], tuple[dict[str, float], dict[str, Any] | None]] | None = None,
    time_box: TimeBox | None = None,
) -> str:
    """Trains from `setting.first_update` to the end; returns `done`, `stopped` or `not saved`.

    Args:
        engine: The task in its engine.
        batches: (epoch, first update of it) -> this rank's micro batches to the epoch's end.
        plan: Rates and portions.
        hooks: Asked after every update.
        setting: Told to the hooks.
        checkpoints: Asked when to save, and told what the ranks agreed.
        evaluate: (update, whether for the last time) -> held-out numbers, and the feature panel
            where one is due; called by all ranks.
        time_box: Decides the length after the first updates.
    """
    for hook in hooks:
        hook.on_start(setting)
    engine.task.train()
    update = setting.first_update
    pictures = BadPictures()

    def evaluated(last: bool) -> None:
        if evaluate is not None:
            begin = time.monotonic()
            metrics, panel = evaluate(update, last)
            if time_box is not None:
                time_box.after_evaluation(time.monotonic() - begin)
            for hook in hooks:
                hook.on_evaluation(update, metrics)
                if panel is not None:
                    hook.on_features(update, panel)

    def save() -> None:
        for hook in hooks:
            hook.on_save(update)
        checkpoints.save(update)

    if update == 0:
        evaluated(False)
    stopped = False
    while update < plan.schedule.total and not stopped:
        epoch, first = divmod(update, plan.updates_per_epoch)
        micro_batches = iter(batches(epoch, first))
        while update < min((epoch + 1) * plan.updates_per_epoch, plan.schedule.total):
            finished = _one_update(engine, micro_batches, plan, update, epoch, pictures)
            update += 1
            if time_box is not None and (total := time_box.after_update()) is not None:
                plan = plan._replace(schedule=replace(plan.schedule, total=total))
                finished = replace(finished, total=total)
            last = update == plan.schedule.total
            wishes = [hook.after_update(finished) for hook in hooks]
            # The one host read of an update: all ranks do what any of them needs.
            wish_save, stopped, busy, failed = distributed.any_flags(
                [any(w.save for w in wishes), any(w.stop for w in wishes), *checkpoints.flags]
            )
            checkpoints.after_update(busy_anywhere=busy, failed_anywhere=failed)
            # Before the checkpoint: a resume does not evaluate again.
            if last or (plan.evaluate_every and update % plan.evaluate_every == 0):
                evaluated(last)
            too_bad = None
            if last or update % plan.count_bad_every == 0:
                too_bad = _too_many_bad(pictures, plan.max_bad_fraction)
            due = checkpoints.due(update, plan.updates_per_epoch)
            if wish_save or stopped or last or due or too_bad:
                save()
            if too_bad:
                checkpoints.settle()
                raise too_bad
            if stopped:
                break
        # Runs the loader dry, so that its workers have ended before the next epoch's are forked.
        if update % plan.updates_per_epoch == 0:
            assert next(micro_batches, None) is None
    saved = checkpoints.settle()
    status = "done" if update >= plan.schedule.total else "stopped"
    if not saved:
        status = "not saved"
    for hook in hooks:
        hook.on_end(status)
    return status


def _too_many_bad(pictures: BadPictures, max_bad_fraction: float) -> DataError | None:
    """The error that ends the run, the same on every rank, or None."""
    count = BadCount(*distributed.sum_tensor(torch.tensor(pictures.count)).tolist())
    if not past_limit(count, max_bad_fraction):
        return None
    names = [name for mine in distributed.gather_objects(pictures.names) for name in mine]
    return limit_error(count, max_bad_fraction, names)


def _one_update(
    engine: Engine,
    micro_batches: Iterator[Batch],
    plan: Plan,
    update: int,
    epoch: int,
    pictures: BadPictures,
) -> Update:
    rate = plan.schedule.at_update(update)
    set_rate(engine.deepspeed.optimizer, rate)
    losses = []
    norm: Tensor | float | None = None
    for portion in range(plan.accumulation):
        batch = next(micro_batches)
        pictures.add(len(batch.positions), batch.bad)
        with out_of_memory_named(len(batch.positions)):
            losses.append(forward_backward(engine, batch, plan.seed))
            if engine.stage == 0 and portion == plan.accumulation - 1:
                norm = _whole_norm(engine.task)
            engine.deepspeed.step()
    if norm is None:
        norm = engine.deepspeed.get_global_grad_norm()
    loss = torch.stack(losses).mean()
    return Update(update, plan.schedule.total, epoch, loss, norm, rate)


def forward_backward(engine: Engine, batch: Batch, seed: int) -> Tensor:
    """One micro batch forward and backward; returns its detached loss."""
    batch = batch.to(distributed.device())
    keep = None
    if any(engine.task.drop_path_rates):
        keep = drop_path_keep(engine.task.drop_path_rates, seed, batch.epoch, batch.positions)
        keep = keep.to(distributed.device(), non_blocking=True)
    with torch.no_grad():
        prepared = engine.task.prepare(batch.images, keep)
    loss, _ = engine.deepspeed(**prepared)
    # DeepSpeed divides by the accumulation itself; what backward returns is not the loss.
    engine.deepspeed.backward(loss)
    return loss.detach()


def _whole_norm(task: torch.nn.Module) -> Tensor:
    """The norm that DeepSpeed keeps to itself at stage 0, before it clips."""
    norms = [p.grad.norm() for p in task.parameters() if p.grad is not None]
    return torch.stack(norms).norm()


def probe_phases(
    engine: Engine, image_size: int, seed: int
) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """A whole update on grey images in two phases, for the micro-batch probe."""

    def through(size: int) -> None:
        images = torch.full((size, 3, image_size, image_size), 128, dtype=torch.uint8)
        positions = torch.arange(size)
        forward_backward(engine, Batch(images, 0, positions, positions), seed)

    def step(size: int) -> None:
        engine.deepspeed.step()

    return through, step

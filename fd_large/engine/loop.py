"""The trainer: batches in, updates out, hooks asked, checkpoints written. It knows no teacher."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fd_large import distributed
from fd_large.data.draws import drop_path_keep
from fd_large.data.loader import Batch
from fd_large.engine.build import Engine
from fd_large.engine.micro_batch import out_of_memory_named
from fd_large.engine.optimizer import set_rate
from fd_large.engine.schedule import CosineSchedule
from fd_large.runtime.hooks import Hook, Request, Setting, Update

log = logging.getLogger(__name__)


class Plan(NamedTuple):
    """How long and in what portions a run trains.

    Attributes:
        schedule: Learning rates.
        updates_per_epoch: Whole global batches in an epoch.
        accumulation: Micro batches per update.
        seed: Of order, crops and drop path.
    """

    schedule: CosineSchedule
    updates_per_epoch: int
    accumulation: int
    seed: int


def train_updates(
    engine: Engine,
    batches: Callable[[int, int], Iterator[Batch]],
    plan: Plan,
    hooks: Sequence[Hook],
    setting: Setting,
    save: Callable[[int], None],
) -> str:
    """Trains from `setting.first_update` to the end; returns `done` or `stopped`.

    Args:
        engine: The task in its engine.
        batches: (epoch, first update of it) -> this rank's micro batches to the epoch's end.
        plan: Rates and portions.
        hooks: Asked after every update.
        setting: Told to the hooks.
        save: Writes a checkpoint of that many finished updates; called by all ranks.
    """
    for hook in hooks:
        hook.on_start(setting)
    engine.task.train()
    update, saved = setting.first_update, setting.first_update
    status = "done"
    while update < setting.total_updates:
        epoch, first = divmod(update, plan.updates_per_epoch)
        micro_batches = iter(batches(epoch, first))
        for _ in range(first, plan.updates_per_epoch):
            finished = _one_update(engine, micro_batches, plan, update, epoch)
            update += 1
            request = _agreed([hook.after_update(finished) for hook in hooks])
            if request.save:
                save(update)
                saved = update
            if request.stop:
                status = "stopped"
            if request.stop or update == setting.total_updates:
                break
        if saved < update:
            save(update)
            saved = update
        if status == "stopped":
            break
    for hook in hooks:
        hook.on_end(status)
    return status


def _one_update(
    engine: Engine, micro_batches: Iterator[Batch], plan: Plan, update: int, epoch: int
) -> Update:
    rate = plan.schedule.at_update(update)
    set_rate(engine.deepspeed.optimizer, rate)
    losses = []
    norm: Tensor | float | None = None
    for portion in range(plan.accumulation):
        batch = next(micro_batches)
        with out_of_memory_named(len(batch.positions)):
            losses.append(forward_backward(engine, batch, plan.seed))
            if engine.stage == 0 and portion == plan.accumulation - 1:
                norm = _whole_norm(engine.task)
            engine.deepspeed.step()
    if norm is None:
        norm = engine.deepspeed.get_global_grad_norm()
    return Update(update, epoch, torch.stack(losses).mean(), norm, rate)


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


def _agreed(requests: Sequence[Request]) -> Request:
    """What any rank's hook asked for, all ranks do."""
    save, stop = distributed.any_flags(
        [any(request.save for request in requests), any(request.stop for request in requests)]
    )
    return Request(save=save, stop=stop)


def probe_step(engine: Engine, image_size: int, seed: int) -> Callable[[int], Any]:
    """A function that runs one whole step on grey images, for the micro-batch probe."""

    def step(size: int) -> None:
        images = torch.full((size, 3, image_size, image_size), 128, dtype=torch.uint8)
        positions = torch.arange(size)
        forward_backward(engine, Batch(images, 0, positions, positions), seed)
        engine.deepspeed.step()

    return step

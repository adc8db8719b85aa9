"""One micro batch through the task: draws and targets without gradient, loss, backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fd_large import distributed
from fd_large.data.loader import Batch
from fd_large.data.random_numbers import drop_path_keep
from fd_large.engine.task import Task
from fd_large.engine.zero.engine import Engine


def prepared(task: Task, batch: Batch, seed: int) -> dict[str, Any]:
    """The task's arguments for a micro batch: everything that needs no gradient."""
    batch = batch.to(distributed.device())
    keep = None
    if any(task.drop_path_rates):
        keep = drop_path_keep(task.drop_path_rates, seed, batch.epoch, batch.positions)
        if distributed.device().type == "cuda":
            # From other memory than pinned the copy may wait for what the device has queued.
            keep = keep.pin_memory().to(distributed.device(), non_blocking=True)
    with torch.no_grad():
        return task.prepare(batch.images, batch.targets, keep)


def forward_backward(engine: Engine, batch: Batch, seed: int) -> Tensor:
    """One micro batch forward and backward; returns its detached loss."""
    loss, _ = engine.deepspeed(**prepared(engine.task, batch, seed))
    # DeepSpeed divides by the accumulation itself; what backward returns is not the loss.
    engine.deepspeed.backward(loss)
    return loss.detach()


def probe_phases(
    engine: Engine, batch_of: Callable[[int], Batch], seed: int
) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """A whole step on made-up batches in two phases, for the micro-batch probe."""

    def through(size: int) -> None:
        forward_backward(engine, batch_of(size), seed)

    def step(size: int) -> None:
        engine.deepspeed.step()

    return through, step

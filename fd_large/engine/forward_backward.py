"""One micro batch through a task: what needs no gradient, then loss and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fd_large import distributed
from fd_large.data.loader import Batch
from fd_large.data.random_numbers import drop_path_keep
from fd_large.engine.task import Task
from fd_large.engine.zero.engine import Engine


def prepared(task: Task, batch: Batch, seed: int) -> dict[str, Any]:
    """Returns the arguments of the task's `forward` for a micro batch, without gradient.

    Args:
        task: The trained Module, outside of its engine.
        batch: The micro batch, on any device.
        seed: Seed of the drop path.
    """
    batch = batch.to(distributed.device())
    keep = None
    if any(task.drop_path_rates):
        keep = drop_path_keep(task.drop_path_rates, seed, batch.epoch, batch.positions)
        if distributed.device().type == "cuda":
            # Copying from memory that is not pinned may wait for what is queued on the device.
            keep = keep.pin_memory().to(distributed.device(), non_blocking=True)
    with torch.no_grad():
        return task.prepare(batch.images, batch.targets, keep)


def forward_backward(engine: Engine, batch: Batch, seed: int) -> Tensor:
    """Runs forward and backward of one micro batch; returns its loss, a detached scalar."""
    loss, _ = engine.deepspeed(**prepared(engine.task, batch, seed))
    # DeepSpeed divides by the accumulation itself; what backward returns is not the loss.
    engine.deepspeed.backward(loss)
    return loss.detach()

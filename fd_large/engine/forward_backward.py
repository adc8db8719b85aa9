"""Runs the micro batches of a step: preparation without gradient, forward, and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fd_large.data.loader import Batch
from fd_large.data.random_numbers import drop_path_keep
from fd_large.engine.task import Task
from fd_large.engine.zero.engine import Engine
from fd_large.ranks import distributed


def prepared(task: Task, batch: Batch, seed: int) -> dict[str, Any]:
    """Runs a task's `prepare` on a micro batch without gradient; returns the `forward` arguments.

    Args:
        task: The trained Module, outside of its engine.
        batch: The micro batch, on any device.
        seed: Seed of the drop path and of the task's random draws.
    """
    batch = batch.to(distributed.device())
    keep = None
    if any(task.drop_path_rates):
        keep = _on_device(drop_path_keep(task.drop_path_rates, seed, batch.epoch, batch.positions))
    draws = task.draws(seed, batch.epoch, batch.positions)
    more = {"draws": {name: _on_device(drawn) for name, drawn in draws.items()}} if draws else {}
    with torch.no_grad():
        return task.prepare(batch.images, batch.targets, keep, **more)


def completed(task: Task, batch: Batch) -> Batch:
    """Returns a micro batch, on the device, with the frozen models' outputs in its targets."""
    with torch.no_grad():
        return replace(batch, targets=task.learnt(batch.images, batch.targets))


def _on_device(drawn: Tensor) -> Tensor:
    if distributed.device().type != "cuda":
        return drawn
    # Copying from memory that is not pinned may wait for what is queued on the device.
    return drawn.pin_memory().to(distributed.device(), non_blocking=True)


def arguments_of_step(
    task: Task, forward: Callable[..., Any], batches: Iterable[Batch], seed: int, *, count: int
) -> Iterator[dict[str, Any]]:
    """Yields the arguments of the task's `forward` for each micro batch of a step, in turn.

    If `task.two_passes(count)` is False, each micro batch is taken and prepared on demand.
    Otherwise all micro batches are taken and prepared first. `task.sums` of each is then added in
    the order of the micro batches, and over the ranks by one small all-reduce, in float64. The
    arguments include the totals (`task.with_totals`). Sums of integers are exact; other sums vary
    with the number of ranks and micro batches by rounding.

    Args:
        task, seed: See `prepared`.
        forward: Calls the task's `forward`, through the engine if there is an engine.
        batches: This rank's micro batches of the step, on any device.
        count: Number of the micro batches.
    """
    if not task.two_passes(count):
        for batch in batches:
            yield prepared(task, batch, seed)
        return
    task.begin_sums(count)
    prepared_batches: list[dict[str, Any]] = []
    rank_sums: Tensor | None = None
    for batch in batches:
        prepared_batches.append(prepared(task, batch, seed))
        with torch.no_grad():
            sums = task.sums(forward, prepared_batches[-1])
            # Never in place: the sums may be a task's own tensor.
            rank_sums = sums if rank_sums is None else rank_sums + sums
    assert rank_sums is not None
    totals = distributed.sum_tensor(rank_sums)
    parts = count * distributed.world_size()
    while prepared_batches:
        # Popping it frees its memory once its turn is over.
        yield task.with_totals(prepared_batches.pop(0), totals, parts=parts)


def backward(engine: Engine, arguments: dict[str, Any]) -> Tensor:
    """Runs forward and backward of one micro batch; returns its loss, a detached scalar.

    The dict of `forward`'s arguments is emptied, to free memory that backward does not need.
    """
    loss, _ = engine.deepspeed(**arguments)
    arguments.clear()
    # DeepSpeed divides by the accumulation itself; what backward returns is not the loss.
    engine.deepspeed.backward(loss)
    return loss.detach()


def forward_backward(engine: Engine, batch: Batch, seed: int) -> Tensor:
    """Runs forward and backward of a step with a single micro batch, on any device.

    Returns the loss, a detached scalar. For `seed` see `prepared`.
    """
    (arguments,) = arguments_of_step(engine.task, engine.deepspeed, [batch], seed, count=1)
    return backward(engine, arguments)

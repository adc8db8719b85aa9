"""A task with the weights of a checkpoint, whole in one process: no process group, no engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from fd_large.checkpoint import stream
from fd_large.checkpoint.read import Reader
from fd_large.engine.task import Task
from fd_large.engine.zero import partition

AnyTask = TypeVar("AnyTask", bound=Task)


def stored_task(make: Callable[[], AnyTask], reader: Reader, *, kind: str) -> AnyTask:
    """Builds a task in float32 on the CPU.

    Args:
        make: Constructs it.
        reader: Of a checkpoint, whatever ranks and ZeRO stage wrote it.
        kind: "master", or "ema" (`stream.outcome` says what the run is trained for).

    Raises: CheckpointError: if the checkpoint is of another task.
    """
    task = partition.build(make, {}, partitioned=False, seed=0)
    stream.check(reader, {name: tuple(p.shape) for name, p in task.named_parameters()})
    with torch.no_grad():
        for name, parameter in task.named_parameters():
            parameter.copy_(stream.read(reader, name, tuple(parameter.shape), kind=kind))
    return task

"""Builds engines of small distillation runs, for the benchmarks that time a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from harness import ROOT, turns

from fd_large.data.loader import Batch
from fd_large.engine.opening import engine_of
from fd_large.engine.zero import config as ds
from fd_large.engine.zero.engine import Engine
from fd_large.ranks import distributed
from fd_large.recipes.run import Run
from fd_large.tasks.distillation.job import DistillationJob


def job_of(run: Run, *, persistence_threshold: int = 0) -> DistillationJob:
    """Returns the job of a run, with the teacher built in the run's precision.

    Args:
        run: The recipe.
        persistence_threshold: Number of elements up to which a tensor of a sharded teacher stays
            whole on every rank.
    """
    job = DistillationJob(run)
    job.build(
        bfloat16=ds.computes_in_bfloat16(run.engine.precision),
        node_size=distributed.world_size(),
        persistence_threshold=persistence_threshold,
    )
    return job


def zero_engine(
    run: Run,
    make_task: Callable[[], Any],
    config: str | dict[str, Any],
    *,
    micro_batch_size: int,
) -> Engine:
    """Returns the engine of a student, in training mode.

    Args:
        run: The recipe.
        make_task: Function that builds the student with its loss.
        config: Name of a file in ds_configs/, or the content of a DeepSpeed JSON; {} for ZeRO-0.
        micro_batch_size: Images per rank and step.
    """
    if isinstance(config, str):
        config = ds.load(ROOT / f"ds_configs/{config}.json")
    job = DistillationJob(run)
    world, node = distributed.world_size(), distributed.local_world_size()
    numbers = ds.RunNumbers(
        micro_batch_size,
        1,
        world,
        node,
        run.optim.clip_norm,
        ds.computes_in_bfloat16(run.engine.precision),
        sum(job.tensor_sizes(), ()),
        trained_sizes=job.tensor_sizes().trained,
    )
    engine = engine_of(run, make_task, ds.fill(config, numbers))
    engine.task.train()
    return engine


def noise(micro_batch_size: int, image_size: int) -> Batch:
    """Returns a batch of `micro_batch_size` random uint8 images of side `image_size` pixels.

    The images are different on every rank, and the same at every call.
    """
    rank = distributed.rank()
    generator = torch.Generator().manual_seed(rank)
    shape = (micro_batch_size, 3, image_size, image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    positions = torch.arange(micro_batch_size) + micro_batch_size * rank
    return Batch(images, 0, positions, positions)


def seconds_of(call: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Returns the seconds of a call that all ranks make, between two barriers.

    Args:
        call: The function, without arguments.
        clock: Function that returns the time. The second barrier is left out for processor time.
    """
    distributed.barrier()
    begin = clock()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    # Waiting for the others takes no processor time of this rank.
    if clock is time.perf_counter:
        distributed.barrier()
    return clock() - begin


def seconds_in_turns(
    calls: Mapping[Any, Callable[[], Any]], rounds: int, *, warm_up: int = 0
) -> dict[Any, list[float]]:
    """Times the steps of several contenders in turns, on all ranks.

    Args:
        calls: The step of each contender, by name.
        rounds: Number of measured rounds.
        warm_up: Number of rounds before, which are not measured.

    Returns: the seconds of each contender's step in each round.
    """
    for _ in range(warm_up):
        for call in calls.values():
            call()
    seconds: dict[Any, list[float]] = {name: [] for name in calls}
    for order in turns(list(calls), rounds):
        for name in order:
            seconds[name].append(seconds_of(calls[name]))
    return seconds

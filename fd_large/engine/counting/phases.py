"""Times the phases of a job's real step on one device: frozen models, forward, backward, optimiser.

The task runs without an engine at two micro-batch sizes in turn, so that other work on the machine
slows both sizes alike. The shortest time of each phase counts, since other work can only lengthen a
phase. `plan --probe` uses the straight lines through the times at the two sizes (`plan/phases.py`).
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import nn

from fd_large.engine import block_wrappers
from fd_large.engine.counting.count import count
from fd_large.engine.counting.rates import device_clock
from fd_large.engine.counting.step import models_of, run_step
from fd_large.engine.job import TrainingJob
from fd_large.engine.zero.optimizer import make_optimizer
from fd_large.kernels import choose
from fd_large.plan.counts import Counts, sizes
from fd_large.plan.phases import Phases, line
from fd_large.plan.workload import frozen_in_bfloat16
from fd_large.ranks import activity, distributed
from fd_large.recipes.sections import Optim

log = logging.getLogger(__name__)

# Largest micro-batch that is timed, times `images_together`. On a GPU small ones wait for
# Python, which the plan counts by itself.
MOST_IMAGES, MOST_IMAGES_ON_GPU = 4, 16
ROUNDS = 5
# Fraction of the free memory that a micro-batch may take.
ROOM = 0.5
UPDATE = "update"
# Parameters that the optimiser steps on trial: more than caches hold.
UPDATED = 2**24


def measure(
    job: TrainingJob, *, free_bytes: float, clock: Callable[[], float] = time.perf_counter
) -> Phases | None:
    """Times the phases of a step on all ranks of torch's process group at the same time.

    Args:
        job: The job that describes the task; no weights or images are read.
        free_bytes: Memory that this rank may take, in bytes.
        clock: Returns seconds; on CPU ranks `time.process_time` leaves out other processes.

    Returns: the phases of the slowest rank, or None if the task does not fit on one device or has
        images of several sizes.
    """
    if job.run.data.image_sizes:
        log.warning(
            "--probe: %s draws another image size at each step. Its steps are not timed; their "
            "time is computed from the rates of single operations",
            job.run.name,
        )
        return None
    # All ranks time the same micro-batches.
    free_bytes = min(distributed.gather_objects(free_bytes))
    on_gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if on_gpu and not torch.version.hip else None
    half = frozen_in_bfloat16(job.run.frozen_dtype, on_gpu)
    counts = count(
        job,
        choose.Device(capability, on_gpu=on_gpu, wish=choose.wished()),
        bfloat16=on_gpu,
        frozen_bfloat16=half,
        checkpointing=[False],
        micro_batch_size=job.run.batch.micro_batch_size,
    )[False]
    model_bytes = _bytes(counts, 2 if on_gpu else 4, 2 if half else 4) + 16 * UPDATED
    sizes = _sizes(counts, job.images_together(), ROOM * free_bytes - model_bytes, on_gpu=on_gpu)
    if not sizes:
        log.warning(
            "--probe: %s does not fit on one device: a micro-batch takes %.1f GB, and %.1f GB are "
            "free. Its steps are not timed; their time is computed from the rates of single "
            "operations",
            job.run.name,
            (model_bytes + counts.peak_at(1)) / 1e9,
            free_bytes / 1e9,
        )
        return None
    with activity.work("timing the phases of a step"):
        timer = Timer(job, sizes, clock, frozen_bfloat16=half)
        for _ in range(ROUNDS + 1):
            timer.round()
    return replace(timer.phases(), images=counts.images)


class Timer:
    """Times the phases of a task's step on one device, in several rounds.

    Args:
        job: The job that describes the task; no weights or images are read.
        sizes: Micro-batch sizes to time, at most two.
        clock: Returns seconds.
        frozen_bfloat16: Whether frozen models compute in bfloat16.
    """

    def __init__(
        self,
        job: TrainingJob,
        sizes: tuple[int, ...],
        clock: Callable[[], float],
        *,
        frozen_bfloat16: bool,
    ) -> None:
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        with torch.random.fork_rng(devices=[]), device:
            self._models = models_of(job, bfloat16=on_gpu, frozen_bfloat16=frozen_bfloat16)
            batches = {images: job.probe_batch(images) for images in sizes}
        self._models.task.train()
        if job.run.engine.compile == "blocks":
            block_wrappers.compile_blocks(self._models.task.student.blocks())
        self._now = device_clock(clock)
        self._passes: dict[int, Callable[[Callable[[str], None]], None]] = {
            images: partial(run_step, self._models, batch) for images, batch in batches.items()
        }
        self._passes[0] = _update(job.run.optim, device)
        self._shortest: dict[int, dict[str, float]] = {}
        self._is_warm = False

    def round(self) -> None:
        """Runs and times each micro-batch and the optimiser once; the first round is a warm-up."""
        for images, one_pass in self._passes.items():
            self._models.task.zero_grad()
            seconds = _seconds_of(one_pass, self._now)
            if self._is_warm:
                best = self._shortest.setdefault(images, seconds)
                best |= {phase: min(best[phase], seconds[phase]) for phase in seconds}
        self._is_warm = True

    def phases(self) -> Phases:
        """Returns the phases, each with its shortest time over the rounds on the slowest rank.

        All ranks must call this method.
        """
        times = _slowest(self._shortest)
        update = times.pop(0)[UPDATE]
        names = dict.fromkeys(name for by_phase in times.values() for name in by_phase)
        return Phases(
            seconds={
                name: line({images: by_phase.get(name, 0.0) for images, by_phase in times.items()})
                for name in names
            },
            update=update / UPDATED,
        )


def _sizes(counts: Counts, together: int, room: float, *, on_gpu: bool) -> tuple[int, ...]:
    """Returns the micro-batch sizes to time, at most two; () if not even the least size fits.

    They are multiples of `together`, the job's `images_together`, and take at most `room` bytes.
    """
    if counts.images:
        return (counts.images,) if counts.peak_at(counts.images) <= room else ()
    size = MOST_IMAGES_ON_GPU if on_gpu else MOST_IMAGES
    while size and counts.peak_at(size * together) > room:
        size //= 2
    return tuple(dict.fromkeys(s * together for s in (size // 2, size) if s))


def _bytes(counts: Counts, size: int, frozen_size: int) -> int:
    """Returns the bytes of all parameters and of the gradients of trained parameters together.

    `size` and `frozen_size` are the bytes of an element of trained and of frozen parameters.
    """
    trained = sum(sizes(counts.student))
    frozen = sum(sum(sizes(model)) for model in counts.frozen)
    return 2 * size * trained + frozen_size * frozen


def _update(optim: Optim, device: torch.device) -> Callable[[Callable[[str], None]], None]:
    """Returns a function that clips the gradient of a test parameter and steps the optimiser.

    The parameter has `UPDATED` float32 elements. The function calls its argument with the phase's
    name at the beginning, and with "" at the end.
    """
    parameter = nn.Parameter(torch.zeros(UPDATED, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer([{"params": [parameter]}], optim, on_gpu=device.type == "cuda")

    def update(to: Callable[[str], None]) -> None:
        to(UPDATE)
        nn.utils.clip_grad_norm_([parameter], optim.clip_norm or 1.0)
        optimizer.step()
        to("")

    return update


def _seconds_of(
    one_pass: Callable[[Callable[[str], None]], None], now: Callable[[], float]
) -> dict[str, float]:
    """Runs a pass on all ranks at the same time, and returns {phase: seconds on this rank}.

    The entry "" has the seconds outside of phases. `one_pass` calls its argument with the name of
    each phase that begins, and with "" when a phase ends and no other begins; `now` returns the
    present time in seconds.
    """
    seconds: dict[str, float] = defaultdict(float)
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
    running, since = "", now()

    def to(phase: str) -> None:
        nonlocal running, since
        begins = now()
        seconds[running] += begins - since
        running, since = phase, begins

    one_pass(to)
    return dict(seconds)


def _slowest(mine: dict[int, dict[str, float]]) -> dict[int, dict[str, float]]:
    """Returns the longest seconds of each phase over the ranks; all ranks must call this function.

    Time outside of phases is left out. `mine` is {micro-batch size: {phase: seconds on this rank}};
    the size 0 stands for the optimiser's step.
    """
    ranks = distributed.gather_objects(mine)
    return {
        images: {phase: max(times[images][phase] for times in ranks) for phase in phases if phase}
        for images, phases in mine.items()
    }

"""Finds the largest micro batch whose step fits into memory, without running out of memory.

A rank that runs out of memory leaves the others waiting in a collective, and the run ends
(`ranks.failures`). So the probe tries sizes in rising order. After a step of one image, which makes
the optimiser's moments, it runs a real step at 1, 2, 4 ... images and measures the peak memory of
each phase. The probe tries the next size only if straight lines through the last two peaks predict
that every phase fits on every rank. Each phase has its own line, because the maximum of two lines
bends where they cross. A step of N times as many images needs at most N times the memory. If, by
this rule, every rank has enough memory for the largest size, the probe returns this size at once.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import Any

from torch import Tensor

from fd_large.data.loader import Batch
from fd_large.engine.forward_backward import arguments_of_step, backward, completed
from fd_large.engine.memory import GpuMemory, HostMemory, OutOfMemory, out_of_memory_named
from fd_large.engine.task import Task
from fd_large.engine.zero.engine import Engine
from fd_large.files import json_object, parse_json, write_json
from fd_large.plan.peak_memory import HEADROOM
from fd_large.ranks import distributed
from fd_large.runtime.run_folder import written_or_logged

log = logging.getLogger(__name__)


def candidates(share: int, together: int = 1) -> tuple[int, ...]:
    """Returns the micro batch sizes to try, in rising order.

    A size is valid if it divides `share` and is a multiple of `together`. If `share` is no multiple
    of `together`, images of several ranks share statistics, and `share` is the only valid size. The
    result has the powers of two below the smallest valid size, which only serve to measure memory,
    and then the smallest valid size and its doublings that divide `share`.

    Args:
        share: Images of a rank per step.
        together: Number of images that share the statistics of batch norms.
    """
    least, sizes = together if share % together == 0 else share, [1]
    while 2 * sizes[-1] < least:
        sizes.append(2 * sizes[-1])
    sizes += [least] if least > 1 else []
    while share % (2 * sizes[-1]) == 0:
        sizes.append(2 * sizes[-1])
    return tuple(sizes)


def largest_that_fits(
    share: int,
    phases: Sequence[Callable[[int], None]],
    memory: GpuMemory | HostMemory,
    *,
    together: int = 1,
) -> int:
    """Tries the `candidates` in turn, and returns the largest valid size that fits into memory.

    All ranks must call this function and get the same size.

    Args:
        phases: Functions of a number of images, which together run a whole step: forward and
            backward, then the optimiser's step.
        memory: Measures the memory of this rank.
        share, together: See `candidates`.

    Raises: OutOfMemory: if not even one image, or one group with shared statistics, fits.
    """
    best = 0
    measured: list[tuple[int, list[int]]] = []
    # If the first step were measured, its new moments would count as memory of its image.
    _take_first(phases)
    sizes = candidates(share, together)
    largest = sizes[-1]
    for size in sizes:
        if measured:
            s1, last = measured[-1]
            if distributed.max_rank(max(last) * largest / s1 / memory.capacity()) <= HEADROOM:
                return largest
        if len(measured) >= 2:
            s0, before = measured[-2]
            predicted = max(
                p1 + (p1 - p0) / (s1 - s0) * (size - s1)
                for p0, p1 in zip(before, last, strict=True)
            )
            # The fullest rank decides for all.
            if distributed.max_rank(float(predicted / memory.capacity())) > HEADROOM:
                break
        peaks = []
        for phase in phases:
            memory.reset()
            with out_of_memory_named(size):
                phase(size)
            peaks.append(memory.peak())
        log.debug("micro batch %d: peak %.2f GB on this rank", size, max(peaks) / 1e9)
        if distributed.max_rank(float(max(peaks) / memory.capacity())) > 1:
            break
        if size == share or (size % together == 0 and share % size == 0):
            best = size
        measured.append((size, peaks))
    if not best and measured:
        fitting = measured[-1][0]
        less = [size for size in range(2, fitting + 1) if share % size == 0]
        smaller = f"--student.norm_batch {less[-1]}, or " if less else ""
        raise OutOfMemory(
            "student.norm_batch: a group of images with shared batch norm statistics does not fit "
            f"into memory; got groups of {together} images and memory for {fitting}, expected a "
            f"whole group. Set {smaller}--student.activation_checkpointing every, or use more "
            "GPUs."
        )
    if not best:
        raise OutOfMemory(
            "batch.micro_batch_size: not even one image fits; got micro batch 1, expected a step "
            "that fits into memory. Set --student.activation_checkpointing every, use "
            "ds_configs/zero3_offload.json or more GPUs."
        )
    return best


def probe(
    engines: Sequence[Engine],
    batch_of: Callable[[int], Batch],
    *,
    share: int,
    seed: int,
    together: int = 1,
) -> int:
    """Finds the largest micro batch size whose step fits into memory.

    All ranks must call this function and get the same size.

    Args:
        engines: Engines of one student, or of several students that learn from the same steps. They
            do not accumulate, so that each of their steps is a whole step. The probe spoils their
            weights and moments.
        batch_of: Function of a number of images, which makes a batch of the largest images.
        seed: Seed of the drop path.
        share, together: See `candidates`.

    Raises: OutOfMemory: if not even one image fits.
    """
    several = len(engines) > 1
    steps = [_phases(engine, batch_of, share, seed, keeps=several) for engine in engines]
    memory = GpuMemory() if distributed.device().type == "cuda" else HostMemory()
    gc.collect()
    # Each student's steps are measured while the optimiser moments of all students are in memory.
    for phases in steps if several else ():
        _take_first(phases)
    size = share
    for phases in steps:
        size = largest_that_fits(size, phases, memory, together=together)
    return size


def _take_first(phases: Sequence[Callable[[int], None]]) -> None:
    """Runs each of `phases` with one image, so that the optimiser makes its moments."""
    with out_of_memory_named(1):
        for phase in phases:
            phase(1)


def _phases(
    engine: Engine, batch_of: Callable[[int], Batch], share: int, seed: int, *, keeps: bool
) -> tuple[Callable[[int], None], ...]:
    """Returns two functions of a micro batch size: forward and backward, and the optimiser's step.

    For the other arguments see `probe`. With `keeps`, all micro batches of a step stay on the
    device, for other students.
    """
    # What `StepForSeveral` keeps of the other micro batches until the step is over.
    other_tensors: list[Tensor] = []

    def through(size: int) -> None:
        count = share // size
        if keeps and count > 1:
            other_tensors.extend(_copies(engine.task, batch_of(size), count - 1))
        arguments = arguments_of_step(
            engine.task, engine.deepspeed, repeat(batch_of(size), count), seed, count=count
        )
        # While the other micro batches that a step in two passes has prepared are in memory.
        backward(engine, next(arguments))
        arguments.close()

    def step(size: int) -> None:
        engine.deepspeed.step()
        other_tensors.clear()

    engine.task.train()
    return through, step


def _copies(task: Task, batch: Batch, count: int) -> list[Tensor]:
    """Returns `count` copies on the device of each tensor in a micro batch.

    These include the outputs of the frozen models of `task`, which are computed here.
    """
    whole = completed(task, batch.to(distributed.device()))
    return [tensor.clone() for _ in range(count) for tensor in whole.tensors()]


def remembered(folder: Path, setting: dict[str, Any], share: int) -> int | None:
    """Returns the micro batch size that an earlier probe stored in the run's folder.

    Returns None if no size is stored, or if the stored size was found in another setting or does
    not divide `share`, a rank's images per step. All ranks must call this function; rank 0 reads
    the file. `setting` is everything that decides a step's memory: ranks, models, DeepSpeed's JSON,
    software.
    """
    known_size = None
    if distributed.is_main():
        # Where the file is absent or damaged, the size is measured.
        with suppress(ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
            file = folder / "micro_batch.json"
            stored = json_object(file)
            before, now = stored["setting"], parse_json(json.dumps(setting))
            size = int(stored["micro_batch_size"])
            other = [n for n in sorted({*before, *now}) if before.get(n) != now.get(n)]
            if other:
                log.info(
                    "%s: the micro batch of %d images was found with other settings (%s); trying "
                    "micro batches again",
                    file,
                    size,
                    ", ".join(other),
                )
            elif share % size == 0:
                known_size = size
    return distributed.broadcast_object(known_size)


def remember(folder: Path, setting: dict[str, Any], size: int) -> None:
    """Writes the micro batch size and its setting to micro_batch.json in the run's folder.

    Only rank 0 writes. If writing fails, the error is logged and not raised.
    """
    if distributed.is_main():
        path = folder / "micro_batch.json"
        with written_or_logged(path):
            write_json(path, {"micro_batch_size": size, "setting": setting})

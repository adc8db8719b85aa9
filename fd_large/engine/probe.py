"""Measures this machine's rates: matrix products, memory, calls, collectives, and a micro-batch.

All ranks measure at the same time, because they share memory and caches. The first rates are those
of single operations; what a real micro-batch of the task takes beside what they make of its counts
is `Rates.slowness`. Rates are medians of several passes.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fd_large.engine.count import count
from fd_large.engine.job import Job
from fd_large.engine.zero.partition import to_bfloat16
from fd_large.kernels import choose
from fd_large.plan.counts import Counts
from fd_large.plan.rates import Rates
from fd_large.plan.step_time import seconds_of
from fd_large.plan.utilisation import peak_flops

log = logging.getLogger(__name__)

CACHE_ELEMENTS = 1 << 26
PASSES = 5
MOST_IMAGES = 8
COPY_ELEMENTS = 2**24
COLLECTIVE_ELEMENTS = 2**23
STARTS = 100
# Side of the matrices that give the rate of products.
SIDE, SIDE_ON_GPU = 1024, 8192
# Bytes that a micro-batch may take of what is free.
ROOM = 0.5


def measure(
    job: Job, *, micro_batch_size: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Measures on this rank, beside the others, in torch's process group.

    Args:
        job: The job of the recipe; its weights and its images are not touched.
        micro_batch_size: Images of the micro-batch that is timed, at most `MOST_IMAGES`.
        clock: Returns seconds; on CPU ranks `time.process_time` leaves out other processes.

    Returns: the fields of `Rates`, with the figures of the slowest rank.
    """
    on_gpu = torch.cuda.is_available()
    world = dist.get_world_size()
    device = torch.device("cuda" if on_gpu else "cpu")
    seconds = _Clock(on_gpu, clock)
    source = torch.ones(COPY_ELEMENTS, device=device)
    target = torch.empty_like(source)
    found = {
        "matmul": _products(seconds, device, torch.bfloat16 if on_gpu else torch.float32),
        "bandwidth": 8 * COPY_ELEMENTS / seconds(lambda: target.copy_(source)),
        "launch_seconds": _start(seconds, device),
    }
    if world > 1:
        flat = torch.ones(COLLECTIVE_ELEMENTS, device=device)
        moved = 2 * 4 * COLLECTIVE_ELEMENTS * (world - 1) / world
        found["link"] = moved / seconds(lambda: dist.all_reduce(flat))
        # Many in a row: a single one would wait for the rank that begins last.
        row = seconds(lambda: [dist.all_reduce(flat[:1]) for _ in range(STARTS)])
        found["start_seconds"] = row / STARTS
    else:
        found["link"] = found["bandwidth"]
    there = _machine(on_gpu, world, found["matmul"])
    rates = Rates(**(there | found))
    found["slowness"] = _slowness(job, seconds, device, min(MOST_IMAGES, micro_batch_size), rates)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, found)
    least = ("matmul", "bandwidth", "link")
    slowest = {
        name: (min if name in least else max)(each[name] for each in everyone) for name in found
    }
    return there | slowest


def _machine(on_gpu: bool, world: int, matmul: float) -> dict[str, Any]:
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        capability = "" if torch.version.hip else f"{properties.major}.{properties.minor}"
        return {
            "name": f"{properties.name}, measured",
            "memory_bytes": float(properties.total_memory),
            "peak": peak_flops(properties.name) or matmul,
            "capability": capability,
        }
    return {
        "name": f"CPU rank of {torch.get_num_threads()} thread(s), measured",
        "memory_bytes": _free_bytes() / world,
        "peak": matmul,  # Without a data sheet, MFU is relative to the measured rate.
        "bfloat16": False,
        "overlap": False,
    }


def _free_bytes() -> float:
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[0])
    return next(
        int(line.split()[1]) * 1024.0
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )


class _Clock:
    """Median seconds of a call, after one that is not counted.

    On a CPU the caches are overwritten first, so that operands come from memory, as in a step.
    """

    def __init__(self, on_gpu: bool, clock: Callable[[], float]) -> None:
        self._now = clock
        self._wait: Callable[[], Any] = torch.cuda.synchronize if on_gpu else lambda: None
        self._other = None if on_gpu else torch.empty(CACHE_ELEMENTS)

    def __call__(self, call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(PASSES + 1):
            if self._other is not None:
                self._other.fill_(1)
            self._wait()
            begin = self._now()
            call()
            self._wait()
            taken.append(self._now() - begin)
        return statistics.median(taken[1:])


def _products(seconds: _Clock, device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of large matrix products, forward and backward."""
    side = SIDE_ON_GPU if device.type == "cuda" else SIDE
    x, weight, gradient = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
    x.requires_grad_()
    weight.requires_grad_()

    def call() -> None:
        x.grad = weight.grad = None
        nn.functional.linear(x, weight).backward(gradient)

    return 3 * 2 * side**3 / seconds(call)


def _start(seconds: _Clock, device: torch.device) -> float:
    """Returns the seconds of a call from Python, forward and backward of tiny layers."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            Count.calls += 1
            return func(*args, **(kwargs or {}))

    layers = [
        layer for _ in range(30) for layer in (nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU())
    ]
    model = nn.Sequential(*layers).to(device)
    x = torch.ones(4, 16, 16, device=device)

    def both() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(x).sum().backward()

    with Count():
        both()
    return seconds(both) / Count.calls


def _slowness(job: Job, seconds: _Clock, device: torch.device, images: int, rates: Rates) -> float:
    """Returns the seconds of a real micro-batch through those that its counts give.

    A task that has no room on one device is not run, and takes the seconds of its counts.
    """
    on_gpu = device.type == "cuda"
    capability = tuple(map(int, rates.capability.split("."))) if rates.capability else None
    stands = choose.Device(capability, on_gpu=on_gpu, wish=choose.wished())
    counts = count(
        job,
        stands,
        bfloat16=on_gpu,
        frozen_bfloat16=on_gpu,
        checkpointing=[False],
        micro_batch_size=images,
    )[False]
    needed = _bytes(counts, 2 if on_gpu else 4) + counts.peak_at(images)
    room = ROOM * _free_bytes() / (1 if on_gpu else dist.get_world_size())
    if needed > room:
        log.warning(
            "--probe: a micro-batch takes %.1f GB, of %.1f that may be used: it is not timed, and "
            "the rates of single operations stand for it",
            needed / 1e9,
            room / 1e9,
        )
        return 1.0
    with device:
        task, frozen = job.models_on_shapes()
        batch = job.probe_batch(images)
    if on_gpu:
        for model in (task, *frozen):
            to_bfloat16(model)
    parameters: list[Tensor] = list(task.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        task.shapes_only(batch).backward()

    products, rest = seconds_of(counts, images, rates)
    starting = 0.0 if on_gpu else sum(counts.calls.values()) * rates.launch_seconds
    return max(0.1, (seconds(step) - starting) / (products + rest))


def _bytes(counts: Counts, size: int) -> int:
    """Bytes of all parameters and of gradients of the trained ones."""
    trained, frozen = (sum(n * times for n, times in of) for of in (counts.student, counts.frozen))
    return size * (2 * trained + frozen)

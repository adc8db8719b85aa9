"""Measures how fast this machine is at matrix products, memory copies, calls and collectives.

All ranks measure at the same time, because they share memory and caches. Rates are medians of
several passes. `phases.py` times a real step of the task.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fd_large.engine.counting.recorder import Recorder
from fd_large.engine.memory import free_bytes
from fd_large.plan.utilisation import peak_flops
from fd_large.ranks import distributed

CACHE_ELEMENTS = 1 << 26
PASSES = 5
COPY_ELEMENTS = 2**24
COLLECTIVE_ELEMENTS = 2**23
STARTS = 100
# Side of the matrices that give the rate of products.
SIDE, SIDE_ON_GPU = 1024, 8192


def measure(*, clock: Callable[[], float] = time.perf_counter) -> dict[str, Any]:
    """Measures the rates on all ranks of torch's process group at the same time.

    `clock` returns seconds; on CPU ranks `time.process_time` leaves out other processes.

    Returns: the fields of `plan.rates.Rates` by name, with the figures of the slowest rank.
    """
    on_gpu = torch.cuda.is_available()
    world = dist.get_world_size()
    device = torch.device("cuda" if on_gpu else "cpu")
    seconds = _Clock(on_gpu, clock)
    source = torch.ones(COPY_ELEMENTS, device=device)
    target = torch.empty_like(source)
    figures = {
        "matmul": _products(seconds, device, torch.bfloat16 if on_gpu else torch.float32),
        "bandwidth": 8 * COPY_ELEMENTS / seconds(lambda: target.copy_(source)),
        "launch_seconds": _start(seconds, device),
    }
    if world > 1:
        flat = torch.ones(COLLECTIVE_ELEMENTS, device=device)
        moved = 2 * 4 * COLLECTIVE_ELEMENTS * (world - 1) / world
        figures["link"] = moved / seconds(lambda: dist.all_reduce(flat))
        # Many in a row: a single one would wait for the rank that begins last.
        row = seconds(lambda: [dist.all_reduce(flat[:1]) for _ in range(STARTS)])
        figures["start_seconds"] = row / STARTS
    else:
        figures["link"] = figures["bandwidth"]
    there = _machine(on_gpu, world, figures["matmul"])
    everyone = distributed.gather_objects(figures)
    least = ("matmul", "bandwidth", "link")
    slowest = {
        name: (min if name in least else max)(each[name] for each in everyone) for name in figures
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
        "memory_bytes": free_bytes() / world,
        "peak": matmul,  # Without a data sheet, MFU is relative to the measured rate.
        "bfloat16": False,
        "overlap": False,
    }


def device_clock(clock: Callable[[], float]) -> Callable[[], float]:
    """Returns a clock that waits for the GPU's queued work, if there is a GPU, before `clock()`."""
    if not torch.cuda.is_available():
        return clock

    def now() -> float:
        torch.cuda.synchronize()
        return clock()

    return now


class _Clock:
    """Measures the seconds of a call, as the median of `PASSES` calls after one warm-up call.

    On a CPU the caches are overwritten before each call, so that operands come from memory, as in a
    step.
    """

    def __init__(self, on_gpu: bool, clock: Callable[[], float]) -> None:
        self._now = device_clock(clock)
        self._other = None if on_gpu else torch.empty(CACHE_ELEMENTS)

    def __call__(self, call: Callable[[], Any]) -> float:
        taken = []
        for _ in range(PASSES + 1):
            if self._other is not None:
                self._other.fill_(1)
            begin = self._now()
            call()
            taken.append(self._now() - begin)
        return statistics.median(taken[1:])


def _products(seconds: _Clock, device: torch.device, dtype: torch.dtype) -> float:
    """Returns the FLOP/s of a large square linear layer, forward and backward together."""
    side = SIDE_ON_GPU if device.type == "cuda" else SIDE
    x, weight, gradient = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(3))
    x.requires_grad_()
    weight.requires_grad_()

    def call() -> None:
        x.grad = weight.grad = None
        nn.functional.linear(x, weight).backward(gradient)

    return 3 * 2 * side**3 / seconds(call)


def _start(seconds: _Clock, device: torch.device) -> float:
    """Returns the seconds that it takes to call one tensor operation from Python.

    This is the time of a forward and backward through tiny layers, divided by the number of
    operations that they call.
    """
    layers = [
        layer for _ in range(30) for layer in (nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU())
    ]
    model = nn.Sequential(*layers).to(device)
    x = torch.ones(4, 16, 16, device=device)

    def both() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(x).sum().backward()

    with Recorder() as recorder:
        both()
    return seconds(both) / sum(recorder.calls.values())

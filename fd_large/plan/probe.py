"""Measures this machine's rates for a student: matrix products, memory, operations, collectives.

All ranks measure at the same time, because they share memory and caches, with tensors as large as
the student's. On CPU ranks each class of operations (`plan.traffic`) gets its own rate, because
exponentials and norms are slower there than copies; on a GPU memory limits all of them, and the
bandwidth of a copy stands for them.

Rates are medians of several passes. torch is imported inside functions only.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from fd_large.backbones.swinv2.architecture import SwinV2Architecture
from fd_large.errors import LaunchError
from fd_large.plan.rates import CLASSES, Rates
from fd_large.plan.traffic import ACTIVATION, Stage, counts_of, stages
from fd_large.plan.utilisation import peak_flops
from fd_large.recipes.architectures import resolve
from fd_large.recipes.family import Transformer
from fd_large.recipes.fields import from_plain, plain
from fd_large.recipes.sections import Student

CACHE_ELEMENTS = 1 << 26
PASSES = 5
MOST_IMAGES = 8
COPY_ELEMENTS = 2**24
COLLECTIVE_ELEMENTS = 2**23
STARTS = 100


def probe(
    student: Student, *, image_size: int, ranks: int, micro_batch_size: int | Literal["auto"]
) -> Rates:
    """Measures with as many local ranks as the run is to have.

    Args:
        student: Section of the recipe; it gives the shapes.
        image_size: Side of the images, in pixels.
        ranks: Number of processes; on GPUs at most the number of GPUs.
        micro_batch_size: Images in one pass; at most 8 are measured.

    Raises: LaunchError: if a rank fails.
    """
    import torch

    ranks = min(ranks, torch.cuda.device_count() or ranks)
    batch = MOST_IMAGES if micro_batch_size == "auto" else min(MOST_IMAGES, micro_batch_size)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rates.json"
        request = {
            "student": plain(asdict(student)),
            "image_size": image_size,
            "batch": batch,
            "out": str(out),
        }
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        command = [*launcher, "--module", "fd_large.plan.probe", json.dumps(request)]
        done = subprocess.run(
            [sys.executable, "-m", *command],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            check=False,
        )
        if done.returncode:
            raise LaunchError(
                f"--probe: a rank failed; got exit code {done.returncode}, expected 0. Read its "
                "message above."
            )
        return Rates(**json.loads(out.read_text()))


def measure(
    student: Transformer,
    *,
    image_size: int,
    batch: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Measures on this rank, beside the others, in torch's process group.

    Args:
        student: Architecture that gives the shapes.
        image_size: Side of the images, in pixels.
        batch: Images of a micro-batch.
        clock: Returns seconds; on CPU ranks `time.process_time` leaves out other processes.

    Returns: the fields of `Rates`, with the figures of the slowest rank.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    world = dist.get_world_size()
    device = torch.device("cuda" if on_gpu else "cpu")
    seconds = _Clock(torch, on_gpu, clock)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    found = _products(torch, seconds, student, image_size, batch, device, dtype)
    source = torch.ones(COPY_ELEMENTS, device=device)
    target = torch.empty_like(source)
    found["bandwidth"] = 8 * COPY_ELEMENTS / seconds(lambda: target.copy_(source))
    found["launch_seconds"] = _start(torch, seconds, device)
    if not on_gpu:
        found |= _classes(torch, seconds, student, image_size, batch)
    if world > 1:
        flat = torch.ones(COLLECTIVE_ELEMENTS, device=device)
        moved = 2 * 4 * COLLECTIVE_ELEMENTS * (world - 1) / world
        found["link"] = moved / seconds(lambda: dist.all_reduce(flat))
        # Many in a row: a single one would wait for the rank that begins last.
        row = seconds(lambda: [dist.all_reduce(flat[:1]) for _ in range(STARTS)])
        found["start_seconds"] = row / STARTS
    else:
        found["link"] = found["bandwidth"]
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, found)
    slowest = {
        name: (max if name.endswith("_seconds") else min)(each[name] for each in everyone)
        for name in found
    }
    return slowest | _named(torch, on_gpu, world, slowest["matmul"])


def _named(torch: Any, on_gpu: bool, world: int, matmul: float) -> dict[str, Any]:
    if on_gpu:
        properties = torch.cuda.get_device_properties(0)
        return {
            "name": f"{properties.name}, measured",
            "memory_bytes": float(properties.total_memory),
            "peak": peak_flops(properties.name) or matmul,
        }
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    return {
        "name": f"CPU rank of {torch.get_num_threads()} thread(s), measured",
        "memory_bytes": free / world,
        "peak": matmul,  # Without a data sheet, MFU is relative to the measured rate.
        "bfloat16": False,
        "overlap": False,
    }


class _Clock:
    """Median seconds of a call, after one that is not counted.

    On a CPU the caches are overwritten first, so that operands come from memory, as in a step.
    """

    def __init__(self, torch: Any, on_gpu: bool, clock: Callable[[], float]) -> None:
        self._now = clock
        self._wait = torch.cuda.synchronize if on_gpu else lambda: None
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


def _start(torch: Any, seconds: _Clock, device: Any) -> float:
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
        layer
        for _ in range(30)
        for layer in (torch.nn.Linear(16, 16), torch.nn.LayerNorm(16), torch.nn.GELU())
    ]
    model = torch.nn.Sequential(*layers).to(device)
    x = torch.ones(4, 16, 16, device=device)

    def both() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        model(x).sum().backward()

    with Count():
        both()
    return seconds(both) / Count.calls


def _products(
    torch: Any,
    seconds: _Clock,
    a: Transformer,
    image_size: int,
    batch: int,
    device: Any,
    dtype: Any,
) -> dict[str, float]:
    """Returns the rates of a block's matrix products, forward and backward, over the stages."""

    def random(*shape: int, leaf: bool = True) -> Any:
        return torch.randn(*shape, device=device, dtype=dtype, requires_grad=leaf)

    def linear(rows: int, inner: int, columns: int) -> Callable[[], None]:
        x, weight = random(rows, inner), random(columns, inner)
        gradient = random(rows, columns, leaf=False)

        def call() -> None:
            x.grad = weight.grad = None
            torch.nn.functional.linear(x, weight).backward(gradient)

        return call

    def logits(maps: int, tokens: int, width: int) -> Callable[[], None]:
        q, k = random(maps, tokens, width), random(maps, tokens, width)
        gradient = random(maps, tokens, tokens, leaf=False)

        def call() -> None:
            q.grad = k.grad = None
            (q @ k.transpose(-2, -1)).backward(gradient)

        return call

    flops = taken = small = small_taken = 0.0
    for stage in stages(a, image_size):
        rows, columns = batch * stage.tokens, int(a.mlp_ratio * stage.width)
        flops += stage.depth * 3 * 2 * rows * stage.width * columns
        taken += stage.depth * seconds(linear(rows, stage.width, columns))
        maps, width = rows // stage.group * stage.heads, stage.width // stage.heads
        small += stage.depth * 3 * 2 * maps * stage.group**2 * width
        small_taken += stage.depth * seconds(logits(maps, stage.group, width))
    return {"matmul": flops / taken, "batched_matmul": small / small_taken}


def _classes(
    torch: Any, seconds: _Clock, a: Transformer, image_size: int, batch: int
) -> dict[str, float]:
    """Returns the rates of a block's classes of operations, forward and backward, on a CPU."""
    counts = counts_of(a, "reference", False)
    both = ("forward", "backward")
    moved = dict.fromkeys(CLASSES, 0.0)
    taken = dict.fromkeys(CLASSES, 0.0)
    for stage in stages(a, image_size):
        tokens, width, depth = batch * stage.tokens, stage.width, stage.depth
        hidden = int(a.mlp_ratio * width)
        moved["stream"] += depth * tokens * width * sum(counts.stream[p].channels for p in both)
        taken["stream"] += depth * seconds(_stream(torch, tokens, width))
        moved["activation"] += (
            depth * tokens * hidden * 4 * (ACTIVATION["forward"] + ACTIVATION["backward"])
        )
        taken["activation"] += depth * seconds(_gelu(torch, tokens, hidden))
        for per in (counts.attention[p] for p in both):
            each = per.channels * tokens * width + per.heads * tokens * stage.heads
            moved["attention"] += depth * (each + per.maps * tokens * stage.group * stage.heads)
        attention, products = _attention(
            torch, tokens // stage.group, stage, cosine=isinstance(a, SwinV2Architecture)
        )
        whole = seconds(attention)
        taken["attention"] += depth * max(whole - seconds(products), 0.1 * whole)
    return {name: moved[name] / taken[name] for name in moved}


def _stream(torch: Any, tokens: int, width: int) -> Callable[[], None]:
    """Returns norms, residual sums and copies, forward and backward."""
    x, branch = (torch.randn(tokens, width, requires_grad=True) for _ in range(2))
    weight, bias = (torch.ones(width, requires_grad=True) for _ in range(2))
    scale, gradient = torch.ones(tokens), torch.randn(tokens, width)
    wide = torch.randn(tokens, 9 * width)

    def call() -> None:
        for _ in range(2):
            x.grad = branch.grad = None
            normed = torch.nn.functional.layer_norm(branch, weight.shape, weight, bias)
            y = x + normed * scale[:, None]
            y = y.view(-1, 2, len(y) // 2, y.shape[-1]).transpose(1, 2).contiguous()
            y.view(gradient.shape).backward(gradient)
        wide.sum(0)

    return call


def _gelu(torch: Any, tokens: int, width: int) -> Callable[[], None]:
    """Returns a GELU, forward and backward."""
    hidden = torch.randn(tokens, width, requires_grad=True)
    ones = torch.ones_like(hidden)

    def call() -> None:
        hidden.grad = None
        torch.nn.functional.gelu(hidden).backward(ones)

    return call


def _attention(
    torch: Any, maps: int, stage: Stage, *, cosine: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Returns attention, forward and backward, and its matrix products alone."""
    functional = torch.nn.functional
    heads, group = stage.heads, stage.group
    q, k, v = (
        torch.randn(maps, heads, group, stage.width // heads, requires_grad=True) for _ in range(3)
    )
    upstream = torch.randn(q.shape)
    factor = torch.full((heads, 1, 1), 10.0) if cosine else 0.2
    rows = torch.randn(7, heads, requires_grad=True)
    index = torch.randint(0, 7, (group, group))

    def attention() -> None:
        for t in (q, k, v, rows):
            t.grad = None
        unit = (functional.normalize(t, dim=-1) for t in (q, k)) if cosine else (q, k)
        queries, keys = unit
        logits = (queries * factor) @ keys.transpose(-2, -1)
        logits += functional.embedding(index, rows).permute(2, 0, 1).contiguous()
        (logits.softmax(dim=-1) @ v).backward(upstream)

    def products() -> None:
        q.grad = k.grad = v.grad = None
        ((q @ k.transpose(-2, -1)) @ v).backward(upstream)

    return attention, products


def main(request: str) -> None:
    """Runs one of the ranks that `probe` starts."""
    import torch
    import torch.distributed as dist

    asked = json.loads(request)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    student = from_plain(Student, asked["student"], "student.")
    rates = measure(
        resolve(student.model, student.architecture),
        image_size=asked["image_size"],
        batch=asked["batch"],
    )
    dist.destroy_process_group()
    if rank == 0:
        Path(asked["out"]).write_text(json.dumps(rates))


if __name__ == "__main__":
    main(sys.argv[1])

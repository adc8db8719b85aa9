"""Measures this machine's rates for a run: products, memory, classes of operations, collectives.

Every rank measures at the same time as the others, because they share memory and caches, with
tensors as large as the run's. On CPU ranks each class of operations (`plan.traffic`) gets a rate of
its own, since exponentials and norms are slower there than copies; on a GPU memory limits all of
them, and the bandwidth of a copy stands for them.

Rates are medians of several passes. Needs torch, which is imported only here, inside functions.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fd_large.backbones.swinv2.architecture import SwinV2Architecture
from fd_large.errors import LaunchError
from fd_large.plan.rates import CLASSES, Rates
from fd_large.plan.traffic import ACTIVATION, counts_of, stages
from fd_large.plan.utilisation import peak_of
from fd_large.recipes.run import Run

CACHE_ELEMENTS = 1 << 26
PASSES = 5
COPY_ELEMENTS = 2**24
COLLECTIVE_ELEMENTS = 2**23
STARTS = 100


def probe(run: Run, *, ranks: int, micro_batch_size: int = 8) -> Rates:
    """Measures with as many local ranks as the run is to have.

    Args:
        run: Gives the shapes.
        ranks: Processes; on GPUs at most those of the machine.
        micro_batch_size: Images, where the recipe leaves them open.

    Raises: LaunchError: if a rank fails.
    """
    import torch

    ranks = min(ranks, torch.cuda.device_count() or ranks)
    batch = run.batch.micro_batch_size
    batch = micro_batch_size if batch == "auto" else min(int(batch), micro_batch_size)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rates.json"
        request = {"run": run.to_dict(), "batch": batch, "out": str(out)}
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        base = os.environ | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(ranks),
            "OMP_NUM_THREADS": str(threads),
        }
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "fd_large.plan.probe", json.dumps(request)],
                env=base | {"RANK": str(rank)},
            )
            for rank in range(ranks)
        ]
        codes = _ended(processes)
        if any(codes):
            raise LaunchError(
                f"--probe: a rank failed; got exit codes {codes}, expected 0. Read its message "
                "above."
            )
        return Rates(**json.loads(out.read_text()))


def _ended(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    """Exit codes; where one failed, the others, which wait for it, are ended."""
    while None in (codes := [process.poll() for process in processes]):
        if any(codes):
            for process in processes:
                process.terminate()
            return [process.wait() for process in processes]
        time.sleep(0.1)
    return [process.returncode for process in processes]


def measure(
    run: Run, batch: int, *, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Measures on this rank, beside the others; the slowest rank's figures.

    Args:
        run: Gives the shapes.
        batch: Images of a micro batch.
        clock: Seconds; `time.process_time` leaves out what other processes took, on CPU ranks.

    Returns: the fields of `Rates`. Needs torch's process group.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    world = dist.get_world_size()
    device = torch.device("cuda" if on_gpu else "cpu")
    seconds = _Clock(torch, on_gpu, clock)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    found = _products(torch, seconds, run, batch, device, dtype)
    source = torch.ones(COPY_ELEMENTS, device=device)
    target = torch.empty_like(source)
    found["bandwidth"] = 8 * COPY_ELEMENTS / seconds(lambda: target.copy_(source))
    found["launch_seconds"] = _start(torch, seconds, device)
    if not on_gpu:
        found |= _classes(torch, seconds, run, batch)
    if world > 1:
        flat = torch.ones(COLLECTIVE_ELEMENTS, device=device)
        moved = 2 * 4 * COLLECTIVE_ELEMENTS * (world - 1) / world
        found["link"] = moved / seconds(lambda: dist.all_reduce(flat))
        # Many in a row: one alone would wait for whichever rank begins later.
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
            "peak": peak_of(properties.name) or matmul,
        }
    free = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable")
    )
    return {
        "name": f"CPU rank of {torch.get_num_threads()} thread(s), measured",
        "memory_bytes": free / world,
        "peak": matmul,  # No data sheet: MFU is the share of the measured rate.
        "bfloat16": False,
        "overlap": False,
    }


class _Clock:
    """Median seconds of a call, after one that does not count.

    On a CPU its operands come from memory, as in a step: the caches are filled with other things.
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
    """Seconds of a call from Python, forward and backward of layers too small to compute."""
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
    net = torch.nn.Sequential(*layers).to(device)
    x = torch.ones(4, 16, 16, device=device)

    def both() -> None:
        for parameter in net.parameters():
            parameter.grad = None
        net(x).sum().backward()

    with Count():
        both()
    return seconds(both) / Count.calls


def _products(
    torch: Any, seconds: _Clock, run: Run, batch: int, device: Any, dtype: Any
) -> dict[str, float]:
    """Rates of the products of a block, forward and backward, over the stages."""
    flops = taken = small = small_taken = 0.0
    a = run.student_architecture()
    for stage in stages(a, run.data.image_size):
        rows, inner = batch * stage.tokens, stage.width
        columns = int(a.mlp_ratio * inner)
        x = torch.randn(rows, inner, device=device, dtype=dtype, requires_grad=True)
        weight = torch.randn(columns, inner, device=device, dtype=dtype, requires_grad=True)
        gradient = torch.randn(rows, columns, device=device, dtype=dtype)

        def linear(x: Any = x, weight: Any = weight, gradient: Any = gradient) -> None:
            x.grad = weight.grad = None
            torch.nn.functional.linear(x, weight).backward(gradient)

        flops += stage.depth * 3 * 2 * rows * inner * columns
        taken += stage.depth * seconds(linear)
        maps = batch * stage.tokens // stage.group * stage.heads
        width = inner // stage.heads
        q, k = (
            torch.randn(maps, stage.group, width, device=device, dtype=dtype, requires_grad=True)
            for _ in range(2)
        )
        gradient = torch.randn(maps, stage.group, stage.group, device=device, dtype=dtype)

        def logits(q: Any = q, k: Any = k, gradient: Any = gradient) -> None:
            q.grad = k.grad = None
            (q @ k.transpose(-2, -1)).backward(gradient)

        small += stage.depth * 3 * 2 * maps * stage.group**2 * width
        small_taken += stage.depth * seconds(logits)
    return {"matmul": flops / taken, "batched_matmul": small / small_taken}


def _classes(torch: Any, seconds: _Clock, run: Run, batch: int) -> dict[str, float]:
    """Rates of the classes of operations of a block, forward and backward, on a CPU."""
    from torch.nn import functional

    a = run.student_architecture()
    counts = counts_of(a, "reference", False)
    moved = dict.fromkeys(CLASSES, 0.0)
    taken = dict.fromkeys(moved, 0.0)
    for stage in stages(a, run.data.image_size):
        tokens, width = batch * stage.tokens, stage.width
        elements = tokens * width

        x, branch = (torch.randn(tokens, width, requires_grad=True) for _ in range(2))
        weight, bias = (torch.ones(width, requires_grad=True) for _ in range(2))
        scale = torch.ones(tokens)
        gradient = torch.randn(tokens, width)
        wide = torch.randn(tokens, 9 * width)
        group = stage.group

        def stream(
            x: Any = x,
            branch: Any = branch,
            weight: Any = weight,
            bias: Any = bias,
            scale: Any = scale,
            gradient: Any = gradient,
            wide: Any = wide,
        ) -> None:
            for _ in range(2):
                x.grad = branch.grad = None
                normed = functional.layer_norm(branch, weight.shape, weight, bias)
                y = x + normed * scale[:, None]
                y = y.view(-1, 2, len(y) // 2, y.shape[-1]).transpose(1, 2).contiguous()
                y.view(gradient.shape).backward(gradient)
            wide.sum(0)

        moved["stream"] += (
            stage.depth
            * elements
            * (counts.stream["forward"].channels + counts.stream["backward"].channels)
        )
        taken["stream"] += stage.depth * seconds(stream)

        hidden = torch.randn(tokens, int(a.mlp_ratio * width), requires_grad=True)
        ones = torch.ones_like(hidden)

        def activation(hidden: Any = hidden, ones: Any = ones) -> None:
            hidden.grad = None
            functional.gelu(hidden).backward(ones)

        passes = ACTIVATION["forward"] + ACTIVATION["backward"]
        moved["activation"] += stage.depth * passes * 4 * hidden.numel()
        taken["activation"] += stage.depth * seconds(activation)

        heads, maps = stage.heads, tokens // group
        q, k, v = (
            torch.randn(maps, heads, group, width // heads, requires_grad=True) for _ in range(3)
        )
        upstream = torch.randn(q.shape)
        cosine = isinstance(a, SwinV2Architecture)
        factor = torch.full((heads, 1, 1), 10.0) if cosine else 0.2
        rows = torch.randn(7, heads, requires_grad=True)
        index = torch.randint(0, 7, (group, group))

        def attend(
            qkv: Any = (q, k, v),
            factor: Any = factor,
            rows: Any = rows,
            index: Any = index,
            upstream: Any = upstream,
            cosine: bool = cosine,
        ) -> None:
            for t in (*qkv, rows):
                t.grad = None
            q, k, v = qkv
            if cosine:
                q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
            maps = (q * factor) @ k.transpose(-2, -1)
            maps += functional.embedding(index, rows).permute(2, 0, 1).contiguous()
            (maps.softmax(dim=-1) @ v).backward(upstream)

        def products(q: Any = q, k: Any = k, v: Any = v, upstream: Any = upstream) -> None:
            q.grad = k.grad = v.grad = None
            ((q @ k.transpose(-2, -1)) @ v).backward(upstream)

        for per in (counts.attention["forward"], counts.attention["backward"]):
            each = per.channels * elements + per.heads * tokens * heads
            moved["attention"] += stage.depth * (each + per.maps * tokens * group * heads)
        both = seconds(attend)
        taken["attention"] += stage.depth * max(both - seconds(products), 0.1 * both)
    return {name: moved[name] / taken[name] for name in moved}


def main(request: str) -> None:
    """Is one of the ranks that `probe` starts."""
    import torch
    import torch.distributed as dist

    asked = json.loads(request)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=world)
    rates = measure(Run.from_dict(asked["run"]), asked["batch"])
    dist.destroy_process_group()
    if rank == 0:
        Path(asked["out"]).write_text(json.dumps(rates))


if __name__ == "__main__":
    main(sys.argv[1])

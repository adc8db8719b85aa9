"""How long does each fused AdamW take for SwinV2-G's 3.0B master weights? A part of gpu.sh.

python benchmarks/gpu_adam.py            # on a CUDA device; small on a CPU
python benchmarks/gpu_adam.py --build    # compiles DeepSpeed's, in the folder where runs look
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fd_large.cli.plan_workload import workload
from fd_large.engine.zero import compiled_ops
from fd_large.engine.zero.optimizer import make_optimizer
from fd_large.errors import ConfigError
from fd_large.recipes import registry

STEPS = 6


def milliseconds(optimizer: torch.optim.Optimizer, on_gpu: bool) -> float:
    """Returns the median time of a step of `optimizer` in ms, without the first step.

    Args:
        optimizer: The optimiser, whose parameters have gradients.
        on_gpu: Whether to wait for the GPU at the end of each step.
    """
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main(build: bool) -> None:
    """Prints the time of each implementation of AdamW, and the name of the fastest.

    Args:
        build: Whether to compile DeepSpeed's AdamW instead.
    """
    on_gpu = torch.cuda.is_available()
    if build:
        print("FusedAdam:", compiled_ops.load("FusedAdam") or f"built in {compiled_ops.folder()}")
        return
    run = registry.get("fd_swinv2g")
    sizes = workload(run).student_sizes if on_gpu else [1000, 30]
    masters = [torch.zeros(n, device="cuda" if on_gpu else "cpu") for n in sizes]
    for master in masters:
        master.grad = torch.full_like(master, 1e-3)
    times = {}
    for kind in ("deepspeed", "apex", "torch"):
        try:
            optim = replace(run.optim, fused=kind)
            optimizer = make_optimizer([{"params": masters}], optim, on_gpu=on_gpu)
        except ConfigError as error:
            print(f"{kind}: did not run: {error}", flush=True)
            continue
        times[kind] = milliseconds(optimizer, on_gpu)
        print(f"{kind}: {times[kind]:.1f} ms for {sum(sizes) / 1e9:.2f}B", flush=True)
        optimizer.state.clear()
        del optimizer
    print(f"DECIDED: --optim.fused {min(times, key=times.__getitem__)} is the fastest")


if __name__ == "__main__":
    main("--build" in sys.argv[1:])

"""What every benchmark of several ranks needs: their start, turns, and figures with spread."""

from __future__ import annotations

import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# Contenders of a step (contenders.py), in the order that they are built in: hpZ's group is global
# to the process, and an engine built after it would use it too.
TITLES = {
    "alone": "plain torch, no exchange",
    "ddp": "torch DDP",
    "fsdp2": "torch FSDP2",
    "fairscale": "fairscale FSDP",
    "zero0": "fd_large, ZeRO-0",
    "zero1": "fd_large, ZeRO-1",
    "zero2": "fd_large, ZeRO-2",
    "zero3": "fd_large, ZeRO-3",
    "peer": "Feature-Distillation",
    "hpz": "fd_large, ZeRO-3 with hpZ",
}


def start(program: str, *words: object, ranks: int, launcher: str = "") -> int:
    """Runs a program on every rank, one thread or more each; returns the exit code.

    Args:
        program: A Python file.
        words: Its arguments.
        ranks: Where there is no GPU; else one rank on each.
        launcher: What stands before `python FILE`, for instance "srun --nodes=2"; empty: torchrun
            on this machine.
    """
    import torch

    if not launcher:
        ranks = torch.cuda.device_count() or ranks
        head = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
        # A free port of its own, so that two benchmarks do not meet.
        command = [*head, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", program]
    else:
        command = [*shlex.split(launcher), sys.executable, program]
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run([*command, *map(str, words)], env=environment, check=False).returncode


def turns(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """Yields every round's order: each begins one place later, so that no one always follows."""
    for turn in range(rounds):
        first = turn % len(names)
        yield [*names[first:], *names[:first]]


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and the samples themselves."""
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return {
        "median": statistics.median(samples),
        "quartiles": [quartiles[0], quartiles[2]],
        "samples": list(samples),
    }


def paired(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """The ratio of two samples that were taken in the same rounds."""
    return spread([a / b for a, b in zip(above, below, strict=True)])


def conditions(program: str) -> dict[str, Any]:
    """Command, machine and versions of this process, on a rank or not."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    hidden = ("--as-rank", "--alone")
    words = [word for word in sys.argv[1:] if word not in hidden]
    return {
        "command": " ".join([f"python benchmarks/{Path(program).name}", *words]),
        "machine": gpu or f"{platform.machine()}, {os.cpu_count()} cores, cpu",
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "deepspeed")},
        },
    }

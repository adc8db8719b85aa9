"""Functions that benchmarks share: to start ranks, take turns, compute medians, write results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(os.environ.get("FD_BENCHMARK_RESULTS") or ROOT / "benchmarks" / "results")

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
# What does the same work in the same memory, to which a contender's time is set.
PEERS = {"zero0": "ddp", "zero1": "ddp", "zero2": "ddp", "zero3": "fsdp2", "hpz": "fsdp2"}


def start(program: str, *arguments: object, ranks: int, launcher: str = "") -> int:
    """Runs a program on every rank, and returns the exit code.

    Args:
        program: A Python file.
        arguments: The program's arguments.
        ranks: Number of CPU ranks. On a machine with GPUs there is one rank per GPU instead.
        launcher: The command before `python FILE`, for example "srun --nodes=2"; "" for torchrun
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
        "PYTHONPATH": os.pathsep.join([str(ROOT), *map(str, (ROOT / "tests/support").iterdir())]),
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run([*command, *map(str, arguments)], env=environment, check=False).returncode


def step_parser(program: str, text: str, *, rounds: int) -> argparse.ArgumentParser:
    """Returns a parser with the flags of a benchmark that times steps of several engines.

    Args:
        program: File of the benchmark, whose name the results have.
        text: Docstring of the benchmark, whose first line is the description.
        rounds: Default number of measured steps of each engine.
    """
    out = RESULTS / f"{Path(program).stem}.json"
    parser = argparse.ArgumentParser(description=text.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, small models")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks where there is no GPU")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 3], help="ZeRO stages")
    parser.add_argument("--image-size", type=int, default=64, help="pixels")
    parser.add_argument("--micro-batch", type=int, default=4, help="images per rank and step")
    parser.add_argument("--rounds", type=int, default=rounds, help="measured steps of each engine")
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser, *, quick: dict[str, Any]) -> argparse.Namespace:
    """Returns the parsed flags of the command line.

    Args:
        parser: The parser, which has a flag --quick.
        quick: Defaults that --quick sets, {name of the flag: value}.
    """
    if parser.parse_args().quick:
        parser.set_defaults(**quick)
    return parser.parse_args()


def turns(names: Sequence[Any], rounds: int) -> Iterator[list[Any]]:
    """Yields the order of `names` in each of `rounds` rounds.

    Each round begins with the next name of the list, so that no contender is always the first.
    """
    for turn in range(rounds):
        first = turn % len(names)
        yield [*names[first:], *names[:first]]


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """Returns the median and the quartiles of `samples`, and the samples themselves, for JSON."""
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [samples[0]] * 3
    return {
        "median": statistics.median(samples),
        "quartiles": [quartiles[0], quartiles[2]],
        "samples": list(samples),
    }


def paired(above: Sequence[float], below: Sequence[float]) -> dict[str, Any]:
    """Returns the `spread` of the ratios above[i] / below[i], where i is the number of a round.

    That is their median, their quartiles and the ratios themselves, for JSON.
    """
    return spread([a / b for a, b in zip(above, below, strict=True)])


def conditions(
    program: str, question: str, packages: Sequence[str] = ("torch", "deepspeed")
) -> dict[str, Any]:
    """Returns the conditions of a benchmark for its JSON, which are needed to repeat the benchmark.

    The conditions are the question, the command, the machine, its load and the packages' versions.

    Args:
        program: File of the benchmark.
        question: Docstring of the benchmark, whose first line is the question.
        packages: Packages whose versions affect the results.
    """
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    arguments = [part for part in sys.argv[1:] if part not in ("--as-rank", "--alone")]
    return {
        "question": question.splitlines()[0],
        "command": " ".join([f"python benchmarks/{Path(program).name}", *arguments]),
        "machine": gpu or f"{platform.machine()}, {os.cpu_count()} cores, cpu",
        "load_average": round(os.getloadavg()[0], 2),
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in packages},
        },
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def write(results: dict[str, Any], path: Path) -> None:
    """Writes `results` as JSON to the file `path`, whose folder is created if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")


def save(figure: Any, path: Path) -> None:
    """Writes the plot `figure` to the file `path`, without the top and right sides of its axes."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)

"""How many images a second does a distillation step take at ZeRO 1, 2 and 3?

    python benchmarks/throughput.py [--quick] [--ranks 2] [--model swinv2_tiny] [--image-size 128]

Starts its own ranks (one per GPU, or `--ranks` CPU ranks), builds one engine per stage side by side
and lets them take turns, so that whatever else the machine does hits all alike. The same student,
teacher (random weights, sharded), batch and precision everywhere; images are uint8 noise in memory,
so that no loader is measured. Writes benchmarks/results/throughput.json and a picture.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
STAGES = (1, 2, 3)


def parse() -> argparse.Namespace:
    """Flags of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds, a small student")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks where there is no GPU")
    parser.add_argument("--model", default="swinv2_tiny", help="student and teacher")
    parser.add_argument("--image-size", type=int, default=128, help="pixels")
    parser.add_argument("--micro-batch", type=int, default=8, help="images per rank and step")
    parser.add_argument("--rounds", type=int, default=12, help="measured steps of each stage")
    parser.add_argument("--out", type=Path, default=RESULTS / "throughput.json")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def start_ranks(arguments: argparse.Namespace) -> int:
    """Runs this file again on every rank."""
    import torch

    ranks = torch.cuda.device_count() or arguments.ranks
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += [__file__, *sys.argv[1:], "--as-rank"]
    threads = max(1, (os.cpu_count() or 1) // ranks)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run(command, env=environment, check=False).returncode


def build_engines(arguments: argparse.Namespace) -> dict[str, Any]:
    """One engine per stage, all with the same recipe."""
    from fd_large import distributed
    from fd_large.engine import config as ds
    from fd_large.engine.build import (
        build_engine,
        build_teacher,
        parameter_sizes,
        precision_of,
        task_maker,
    )
    from fd_large.recipes import registry
    from fd_large.recipes.architectures import Architecture

    run = registry.get("fd_swinv2_base")
    shape = Architecture(window_size=arguments.image_size // 16)
    world = distributed.world_size()
    run = replace(
        run,
        student=replace(run.student, model=arguments.model, architecture=shape),
        teacher=replace(
            run.teacher,
            model=arguments.model,
            architecture=shape,
            source="random",
            placement="sharded",
        ),
        data=replace(run.data, image_size=arguments.image_size),
        batch=replace(
            run.batch,
            global_batch_size=arguments.micro_batch * world,
            micro_batch_size=arguments.micro_batch,
        ),
    )
    precision, sizes = precision_of(run), parameter_sizes(run)
    threshold, _ = ds.persistence_threshold(sizes)
    teacher = build_teacher(run, precision, node_size=world, persistence_threshold=threshold)
    engines = {}
    for stage in STAGES:
        numbers = ds.RunNumbers(
            arguments.micro_batch, 1, world, world, run.optim.clip_norm, precision.bfloat16, sizes
        )
        config = ds.fill(ds.load(ROOT / f"ds_configs/zero{stage}.json"), numbers)
        engines[f"ZeRO-{stage}"] = build_engine(
            run, task_maker(run, teacher, teacher.width), config
        )
    return engines


def measure(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Seconds of every measured step by stage; the report on rank 0, None elsewhere."""
    import torch

    from fd_large import distributed
    from fd_large.data.loader import Batch
    from fd_large.engine import start
    from fd_large.engine.forward import forward_backward
    from fd_large.engine.optimizer import set_rate

    distributed.start()
    start.start()
    engines = build_engines(arguments)
    device, size = distributed.device(), arguments.image_size
    images = torch.randint(0, 256, (arguments.micro_batch, 3, size, size), dtype=torch.uint8)
    positions = torch.arange(arguments.micro_batch)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    warm_up = 2
    for turn in range(warm_up + arguments.rounds):
        for name, engine in engines.items():
            set_rate(engine.deepspeed.optimizer, 1e-4)
            distributed.barrier()
            begin = time.perf_counter()
            forward_backward(engine, Batch(images, 0, positions, positions), 0)
            engine.deepspeed.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            distributed.barrier()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - begin)
    if not distributed.is_main():
        return None
    return report(arguments, seconds, sum(p.numel() for p in _any(engines).task.parameters()))


def _any(engines: dict[str, Any]) -> Any:
    return engines["ZeRO-1"]


def report(
    arguments: argparse.Namespace, seconds: dict[str, list[float]], parameters: int
) -> dict[str, Any]:
    """Medians, spread, and ratios of each round's pair, fastest stage first."""
    from importlib.metadata import version

    from fd_large import distributed

    images = arguments.micro_batch * distributed.world_size()
    fastest = min(seconds, key=lambda name: statistics.median(seconds[name]))
    rows = {}
    for name, samples in seconds.items():
        ratios = [a / b for a, b in zip(seconds[fastest], samples, strict=True)]
        rows[name] = {
            "images_per_second": images / statistics.median(samples),
            "seconds_median": statistics.median(samples),
            "seconds_quartiles": statistics.quantiles(samples, n=4),
            f"speed_relative_to_{fastest}": statistics.median(ratios),
            "relative_quartiles": statistics.quantiles(ratios, n=4),
            "samples": samples,
        }
    return {
        "question": __doc__.splitlines()[0],
        "command": "python benchmarks/throughput.py "
        + " ".join(a for a in sys.argv[1:] if a != "--as-rank"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {distributed.device().type}",
        "versions": {p: version(p) for p in ("torch", "deepspeed")},
        "ranks": distributed.world_size(),
        "student": arguments.model,
        "trained_parameters": parameters,
        "image_size": arguments.image_size,
        "micro_batch": arguments.micro_batch,
        "stages": rows,
    }


def draw(results: dict[str, Any], path: Path) -> None:
    """One bar a stage, quartiles as whiskers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(results["stages"])
    images = results["micro_batch"] * results["ranks"]
    heights = [results["stages"][n]["images_per_second"] for n in names]
    low, high = [], []
    for name, height in zip(names, heights, strict=True):
        quartiles = results["stages"][name]["seconds_quartiles"]
        low.append(height - images / quartiles[2])
        high.append(images / quartiles[0] - height)
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.bar(names, heights, yerr=[low, high], capsize=6, color="#4477aa", width=0.55)
    for position, height in enumerate(heights):
        axes.text(position, height * 0.5, f"{height:.1f}", ha="center", color="white", size=13)
    axes.set_ylabel("images per second, all ranks")
    axes.set_title(
        f"{results['student']}, {results['image_size']} px, {results['micro_batch']} images a "
        f"rank, {results['ranks']} ranks\n{results['machine']}",
        size=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> int:
    """Starts the ranks, or is one."""
    arguments = parse()
    if arguments.quick:
        arguments.rounds, arguments.image_size, arguments.micro_batch = 4, 64, 2
    if not arguments.as_rank:
        return start_ranks(arguments)
    results = measure(arguments)
    if results is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
        draw(results, arguments.out.with_suffix(".png"))
        for name, row in results["stages"].items():
            print(f"{name}: {row['images_per_second']:.1f} images/s")
        print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Does the plan's arithmetic, with rates measured here, say how long a step takes here?

    python benchmarks/plan.py [--quick] [--ranks 2] [--model swinv2_tiny] [--image-size 128]

Starts its own CPU ranks (or one per GPU), builds an engine at ZeRO 1, 2 and 3, and in each round
measures the machine's rates (`plan/probe.py`) and right after them a step of each engine, so that
whatever else the machine does hits both (`--clock cpu` counts processor time, which other work
stretches less). A round's figure is measured over predicted. Teacher and
student are the same model; images are noise in memory. Writes benchmarks/results/plan.json.
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
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results"


def parse() -> argparse.Namespace:
    """Flags of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks where there is no GPU")
    parser.add_argument("--model", default="swinv2_tiny", help="student and teacher")
    parser.add_argument("--image-size", type=int, default=128, help="pixels")
    parser.add_argument("--micro-batch", type=int, default=8, help="images per rank and step")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine with other work"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "plan.json")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def start_ranks(arguments: argparse.Namespace) -> int:
    """Runs this file again on every rank."""
    import torch

    ranks = torch.cuda.device_count() or arguments.ranks
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks)]
    command += [__file__, *sys.argv[1:], "--as-rank"]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.run(command, env=environment, check=False).returncode


def the_run(arguments: argparse.Namespace, world: int) -> Any:
    """The recipe: teacher and student of one kind, windows of half the first map's quarter."""
    from fd_large.recipes import registry
    from fd_large.recipes.architectures import Architecture

    run = registry.get("fd_swinv2_base")
    shape = Architecture(window_size=arguments.image_size // 16)
    return replace(
        run,
        student=replace(run.student, model=arguments.model, architecture=shape),
        teacher=replace(run.teacher, model=arguments.model, architecture=shape, source="random"),
        data=replace(run.data, image_size=arguments.image_size),
        batch=replace(
            run.batch,
            global_batch_size=arguments.micro_batch * world,
            micro_batch_size=arguments.micro_batch,
        ),
    )


def measure(arguments: argparse.Namespace) -> int:
    """Alternates probe and steps; rank 0 reports."""
    import torch

    from fd_large import distributed
    from fd_large.data.loader import Batch
    from fd_large.engine.forward import forward_backward
    from fd_large.engine.run import engine_of
    from fd_large.engine.zero import config as ds
    from fd_large.engine.zero import start
    from fd_large.engine.zero.optimizer import set_rate
    from fd_large.plan import probe
    from fd_large.plan.cluster import Cluster
    from fd_large.plan.memory import persistence_threshold
    from fd_large.plan.rates import Rates
    from fd_large.plan.setting import Machine, Setting, Workload
    from fd_large.plan.step import estimate
    from fd_large.tasks.distillation.job import DistillationJob

    distributed.start()
    start.start()
    world = distributed.world_size()
    run = the_run(arguments, world)
    bfloat16, job = ds.computes_in_bfloat16(run.engine.precision), DistillationJob(run)
    sizes = job.parameter_sizes()
    threshold = persistence_threshold(sizes)
    job.build(bfloat16=bfloat16, node_size=world, persistence_threshold=threshold)
    engines = {}
    # In float32 on one rank stages 1 and 2 are stage 0.
    for stage in (1, 2, 3) if world > 1 or bfloat16 else (0, 3):
        numbers = ds.RunNumbers(
            arguments.micro_batch, 1, world, world, run.optim.clip_norm, bfloat16, sizes
        )
        shipped = ds.load(ROOT / f"ds_configs/zero{stage}.json") if stage else {}
        config = ds.fill(shipped, numbers)
        engines[stage] = engine_of(run, job.make_task, config)
    size = arguments.image_size
    images = torch.randint(0, 256, (arguments.micro_batch, 3, size, size), dtype=torch.uint8)
    positions = torch.arange(arguments.micro_batch)
    cluster = Cluster(gpus=world, gpus_per_node=world, nic_gigabits=1.0, nics_per_node=1)
    load = Workload.of(run)
    rounds: list[dict[str, Any]] = []
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    for turn in range(1 + (3 if arguments.quick else arguments.rounds)):
        found = probe.measure(run, arguments.micro_batch, clock=clock)
        machine = Machine(cluster=cluster, rates=Rates(**found), kernels="reference")
        row: dict[str, Any] = {"rates": found, "load": os.getloadavg()[0]}
        for stage, engine in engines.items():
            set_rate(engine.deepspeed.optimizer, 1e-4)
            distributed.barrier()
            begin = clock()
            forward_backward(engine, Batch(images, 0, positions, positions), 0)
            engine.deepspeed.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if arguments.clock == "wall":
                distributed.barrier()
            seconds = clock() - begin
            setting = Setting(stage=stage, micro_batch_size=arguments.micro_batch)
            planned = estimate(load, setting, machine).seconds
            row[f"ZeRO-{stage}"] = {
                "measured": seconds,
                "predicted": planned.total,
                "products": planned.products,
                "rest": planned.rest,
                "communication": planned.communication,
                "update": planned.update,
            }
        if turn:  # The first round warms up.
            rounds.append(row)
    if distributed.is_main():
        report(arguments, rounds, load.parameters, world)
    return distributed.leave(0)


def report(
    arguments: argparse.Namespace, rounds: list[dict[str, Any]], parameters: int, world: int
) -> None:
    """Prints and writes the ratios."""
    ratios = {
        stage: [row[stage]["measured"] / row[stage]["predicted"] for row in rounds]
        for stage in rounds[0]
        if stage.startswith("ZeRO-")
    }
    results = {
        "question": __doc__.splitlines()[0],
        "command": " ".join(
            ["python benchmarks/plan.py", *(w for w in sys.argv[1:] if w != "--as-rank")]
        ),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "deepspeed")},
        "machine": {
            "processor": f"{platform.machine()}, {os.cpu_count()} cores",
            "load_average": [row["load"] for row in rounds],
        },
        "ranks": world,
        "model": arguments.model,
        "parameters": parameters,
        "measured_over_predicted": {
            stage: {"median": statistics.median(values), "rounds": values}
            for stage, values in ratios.items()
        },
        "rounds": rounds,
    }
    arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print(
        f"{arguments.model}, {parameters / 1e6:.1f}M, {world} rank(s), {arguments.clock} time; "
        "measured / predicted:"
    )
    for stage, values in ratios.items():
        seconds = statistics.median(row[stage]["measured"] for row in rounds)
        print(
            f"  {stage}: {seconds:.2f} s, median ratio {statistics.median(values):.2f} "
            f"({min(values):.2f} to {max(values):.2f})"
        )
    print(f"  load average {statistics.median(row['load'] for row in rounds):.1f}")


if __name__ == "__main__":
    flags = parse()
    sys.exit(measure(flags) if flags.as_rank else start_ranks(flags))

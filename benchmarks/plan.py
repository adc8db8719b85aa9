"""Does the arithmetic of `plan`, with rates measured here, predict how long a step takes here?

    python benchmarks/plan.py [--quick] [--ranks 2] [--model swinv2_tiny] [--image-size 128]

Starts its own CPU ranks (or one per GPU) and builds an engine at ZeRO 1, 2 and 3. Each round
measures the machine's rates (`engine/probe.py`) and right after them a step of each engine, so that
other work on the machine affects both (`--clock cpu` counts processor time, which other work
stretches less). The figure of a round is measured / predicted. Teacher and student are the same
model; images are noise in memory. Writes benchmarks/results/plan.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import RESULTS


def parse() -> argparse.Namespace:
    """Reads the flags."""
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


def the_run(arguments: argparse.Namespace, world: int) -> Any:
    """Returns the recipe: teacher and student alike, windows a sixteenth of the image wide."""
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
    from engines import job_of, noise, seconds_of, zero_engine

    from fd_large import distributed
    from fd_large.cli.plan import workload
    from fd_large.engine.forward_backward import forward_backward
    from fd_large.engine.probe import measure as measured_rates
    from fd_large.engine.zero import start
    from fd_large.engine.zero.optimizer import set_learning_rate
    from fd_large.plan.candidate import Candidate
    from fd_large.plan.cluster import Cluster, Machine
    from fd_large.plan.rates import Rates
    from fd_large.plan.step_time import estimate

    distributed.start()
    start.start()
    world = distributed.world_size()
    run = the_run(arguments, world)
    job = job_of(run)
    # In float32 on one rank, stages 1 and 2 are stage 0.
    stages = (1, 2, 3) if world > 1 or distributed.device().type == "cuda" else (0, 3)
    engines = {
        stage: zero_engine(
            run,
            job.make_task,
            f"zero{stage}" if stage else {},
            micro_batch_size=arguments.micro_batch,
        )
        for stage in stages
    }
    batch = noise(arguments.micro_batch, arguments.image_size)

    def step(engine: Any) -> None:
        set_learning_rate(engine.deepspeed.optimizer, 1e-4)
        forward_backward(engine, batch, 0)
        engine.deepspeed.step()

    cluster = Cluster(gpus=world, gpus_per_node=world, nic_gigabits=1.0, nics_per_node=1)
    load: Any = None
    rounds: list[dict[str, Any]] = []
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    for turn in range(1 + (3 if arguments.quick else arguments.rounds)):
        found = measured_rates(job_of(run), micro_batch_size=arguments.micro_batch, clock=clock)
        rates = Rates(**found)
        load = load or workload(run, rates)
        machine = Machine(cluster=cluster, rates=rates)
        row: dict[str, Any] = {"rates": found, "load": os.getloadavg()[0]}
        for stage, engine in engines.items():
            seconds = seconds_of(partial(step, engine), clock)
            candidate = Candidate(stage=stage, micro_batch_size=arguments.micro_batch)
            planned = estimate(load, candidate, machine).seconds
            row[f"ZeRO-{stage}"] = {
                "measured": seconds,
                "predicted": planned.total,
                "products": planned.products,
                "rest": planned.rest,
                "communication": planned.communication,
                "update": planned.finish,
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
        **harness.conditions(__file__, __doc__),
        "load_averages": [row["load"] for row in rounds],
        "ranks": world,
        "model": arguments.model,
        "parameters": parameters,
        "measured_over_predicted": {
            stage: {"median": statistics.median(values), "rounds": values}
            for stage, values in ratios.items()
        },
        "rounds": rounds,
    }
    harness.write(results, arguments.json)
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
    if flags.as_rank:
        sys.exit(measure(flags))
    sys.exit(harness.start(__file__, *sys.argv[1:], "--as-rank", ranks=flags.ranks))

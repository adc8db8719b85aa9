"""Do the phases that `plan --probe` times predict how long a step takes?

    python benchmarks/plan.py [--quick] [--ranks 2] [--model swinv2_tiny] [--images 1 2 4 8 16]
    python benchmarks/plan.py --public

With --public nothing is timed. The time model is compared with published measurements of other
software on GPUs (public_rates.py), and the exit code is 1 if a clean measurement is outside of its
predicted range.

Otherwise the benchmark starts its own CPU ranks (or one per GPU), and builds an engine at ZeRO 1, 2
and 3 (on one rank at 0 and 3). Each round times the phases of a step without an engine
(`engine/counting/phases.py`), and then the steps of all engines with each micro-batch, so that
other work on the machine affects all of them. Half-way the machine's rates are measured
(`engine/counting/rates.py`). `--clock cpu` counts processor time, which other work changes less. A
result is the ratio of the shortest measured step to the prediction from the shortest phases, and
the prediction from the rates alone is shown beside it. Teacher and student are the same model, and
images are noise in memory. Writes benchmarks/results/plan_MODEL_RANKS.json.
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

# Images of the micro-batches that are timed by phases; all others are foretold.
TIMED = (2, 4)


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three rounds")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks where there is no GPU")
    parser.add_argument(
        "--model", choices=("swinv2_tiny", "vit"), default="swinv2_tiny", help="student and teacher"
    )
    parser.add_argument("--image-size", type=int, default=128, help="pixels")
    parser.add_argument(
        "--images", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="micro-batches of a rank"
    )
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a machine with other work"
    )
    parser.add_argument("--public", action="store_true", help="compare with public measurements")
    parser.add_argument("--json", type=Path, help="default: results/plan_MODEL_RANKS.json")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def the_run(arguments: argparse.Namespace, world: int) -> Any:
    """Returns the recipe, in which teacher and student have the same architecture.

    Args:
        arguments: The flags.
        world: Number of ranks.
    """
    from fd_large.recipes import registry
    from fd_large.recipes.architectures import Architecture

    run = registry.get("fd_swinv2_base")
    model, shape = "swinv2_tiny", Architecture(window_size=arguments.image_size // 16)
    if arguments.model == "vit":
        model = "vit_base_patch16"
        shape = Architecture(embed_dim=192, depths=(6,), num_heads=(3,))
    return replace(
        run,
        student=replace(run.student, model=model, architecture=shape),
        teacher=replace(run.teacher, model=model, architecture=shape, source="random"),
        data=replace(run.data, image_size=arguments.image_size),
        batch=replace(run.batch, global_batch_size=world, micro_batch_size=1),
    )


def measure(arguments: argparse.Namespace) -> int:
    """Times phases and steps in turns; rank 0 writes the results. Returns the exit code."""
    from engines import job_of, noise, seconds_of, zero_engine

    from fd_large.cli.plan_workload import workload
    from fd_large.engine.counting import phases
    from fd_large.engine.counting.rates import measure as measure_rates
    from fd_large.engine.forward_backward import forward_backward
    from fd_large.engine.zero import start
    from fd_large.engine.zero.optimizer import set_learning_rate
    from fd_large.plan.candidate import Candidate
    from fd_large.plan.cluster import Cluster, Machine
    from fd_large.plan.rates import Rates
    from fd_large.plan.step_time import estimate
    from fd_large.ranks import distributed

    distributed.start()
    start.start()
    world = distributed.world_size()
    run = the_run(arguments, world)
    on_gpu = distributed.device().type == "cuda"
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    timer = phases.Timer(job_of(run), TIMED, clock, frozen_bfloat16=on_gpu)
    make_task = job_of(run).make_task
    # In float32 on one rank, stages 1 and 2 are stage 0.
    stages = (1, 2, 3) if world > 1 or on_gpu else (0, 3)
    engines = {
        stage: zero_engine(run, make_task, f"zero{stage}" if stage else {}, micro_batch_size=1)
        for stage in stages
    }
    batches = {images: noise(images, arguments.image_size) for images in arguments.images}

    def step(engine: Any, batch: Any) -> None:
        set_learning_rate(engine.deepspeed.optimizer, 1e-4)
        forward_backward(engine, batch, 0)
        engine.deepspeed.step()

    cluster = Cluster(gpus=world, gpus_per_node=world, nic_gigabits=1.0, nics_per_node=1)
    rounds: list[dict[str, Any]] = []
    rates: Any = None
    count = 3 if arguments.quick else arguments.rounds
    for turn in range(1 + count):
        if turn == 1 + count // 2:  # Half-way, and medians of several passes themselves.
            rates = Rates(**measure_rates(clock=clock))
        row: dict[str, Any] = {"load": os.getloadavg()[0], "steps": {}}
        timer.round()  # As often as each step, so that the shortest are as lucky.
        for images, batch in batches.items():
            for stage, engine in engines.items():
                seconds = seconds_of(partial(step, engine, batch), clock)
                row["steps"][f"ZeRO-{stage}, {images}"] = seconds
        if turn:  # The first round warms up.
            rounds.append(row)
    measured = timer.phases()
    machine = Machine(cluster=cluster, rates=rates)
    load = workload(run, rates)
    table = {}
    for stage in stages:
        for images in batches:
            candidate = Candidate(stage=stage, micro_batch_size=images)
            batch_of_all = replace(load, global_batch_size=images * world)
            timed = estimate(replace(batch_of_all, phases=measured), candidate, machine).seconds
            table[f"ZeRO-{stage}, {images}"] = {
                "foretold": timed.total,
                "parts": dict(timed.parts),
                "communication": timed.communication,
                "finish": timed.finish,
                "foretold by rates alone": estimate(batch_of_all, candidate, machine).seconds.total,
            }
    if distributed.is_main():
        report(
            arguments, rounds, table, measured.to_plain(), rates.to_dict(), load.parameters, world
        )
    return distributed.leave(0)


def report(
    arguments: argparse.Namespace,
    rounds: list[dict[str, Any]],
    table: dict[str, Any],
    plain_phases: dict[str, Any],
    rates: dict[str, Any],
    parameters: int,
    world: int,
) -> None:
    """Prints and writes the ratios of measured to predicted steps.

    Args:
        arguments: The flags.
        rounds: The seconds of each step, and the load, of each round.
        table: The predictions for each step, to which the measurements are added.
        plain_phases: The measured phases.
        rates: The measured rates.
        parameters: Number of trained parameters.
        world: Number of ranks.
    """
    for name, row in table.items():
        samples = [turn["steps"][name] for turn in rounds]
        row["measured"] = min(samples)
        row["measured / foretold"] = min(samples) / row["foretold"]
        row["measured / foretold by rates alone"] = min(samples) / row["foretold by rates alone"]
        row["rounds"] = harness.spread(samples)
    results = {
        **harness.conditions(__file__, __doc__),
        "clock": arguments.clock,
        "load_averages": [row["load"] for row in rounds],
        "ranks": world,
        "model": arguments.model,
        "parameters": parameters,
        "rates": rates,
        "phases": plain_phases,
        "steps": table,
    }
    harness.write(results, arguments.json or RESULTS / f"plan_{arguments.model}_{world}.json")
    print(f"{arguments.model}, {parameters / 1e6:.1f}M, {world} rank(s), {arguments.clock} time")
    print("stage, images    measured s  foretold s  ratio   by rates alone")
    for name, row in table.items():
        print(
            f"{name:15s}  {row['measured']:10.3f}  {row['foretold']:10.3f}  "
            f"{row['measured / foretold']:5.2f}   {row['measured / foretold by rates alone']:5.2f}"
        )
    print(f"load average {statistics.median(row['load'] for row in rounds):.1f}")


if __name__ == "__main__":
    flags = parse()
    if flags.public:
        import public_rates

        sys.exit(public_rates.report())
    if flags.as_rank:
        sys.exit(measure(flags))
    sys.exit(harness.start(__file__, *sys.argv[1:], "--as-rank", ranks=flags.ranks))

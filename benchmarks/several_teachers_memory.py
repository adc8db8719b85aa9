"""Do a student and three teachers of 300M parameters take the memory that `plan` predicts?

    python benchmarks/several_teachers_memory.py [--quick] [--placements sharded replicated]

It starts its own CPU ranks. Three CLIP ViT-L/14 with random weights teach a ViT-B/16 at ZeRO-3, in
new processes for each placement. --quick uses models of 11M parameters, which take 2 GB instead of
12. After the first step, which creates the optimiser's moments, the bytes of all tensors are
counted between two steps, and their peak within a step by torch's profiler. Writes
benchmarks/results/several_teachers_memory.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import harness
from harness import RESULTS

TEACHER, STUDENT = "clip_vit_large_patch14", "vit_base_patch16"
# Six by six places each.
STUDENT_PIXELS, TEACHER_PIXELS = 96, 84


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="models of 11M parameters")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--placements", nargs="+", default=["sharded", "replicated"])
    parser.add_argument("--micro-batch", type=int, default=4, help="images per rank and step")
    parser.add_argument("--out", type=Path, default=RESULTS / "several_teachers_memory.json")
    parser.add_argument("--as-rank", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def the_run(placement: str, images: int, *, quick: bool) -> Any:
    """Returns the recipe with three equal teachers, in float32 and with random weights.

    Args:
        placement: Placement of the teachers.
        images: Global batch size.
        quick: Whether the models are small.
    """
    from fd_large.recipes import registry
    from fd_large.recipes.architectures import Architecture
    from fd_large.tasks.distillation.section import NamedTeacher, Objective, Teacher

    run = registry.get("fd_clip_vit_base")
    small = {"embed_dim": 384, "depths": (6,), "num_heads": (6,)} if quick else {}
    teacher = NamedTeacher(
        model=TEACHER,
        architecture=Architecture(image_size=TEACHER_PIXELS, **small),
        source="random",
        placement=placement,
        teacher_image_size=TEACHER_PIXELS,
    )
    return replace(
        run,
        student=replace(run.student, model=STUDENT, architecture=Architecture(**small)),
        teacher=Teacher(),
        objective=Objective(),
        teachers={name: teacher for name in ("one", "two", "three")},
        data=replace(run.data, image_size=STUDENT_PIXELS),
        engine=replace(run.engine, precision="float32"),
        batch=replace(run.batch, global_batch_size=images, micro_batch_size="auto"),
    )


def measure(arguments: argparse.Namespace) -> int:
    """Runs steps and counts the bytes; rank 0 writes the results. Returns the exit code."""
    from engines import job_of, noise, zero_engine
    from tensor_storages import storages
    from torch.profiler import ProfilerActivity, profile

    from fd_large.cli.plan_workload import workload
    from fd_large.engine.forward_backward import forward_backward
    from fd_large.engine.zero import start
    from fd_large.engine.zero.optimizer import set_learning_rate
    from fd_large.plan.candidate import Candidate
    from fd_large.plan.cluster import Cluster, Machine
    from fd_large.plan.peak_memory import peak_memory
    from fd_large.plan.rates import CARDS
    from fd_large.ranks import distributed

    distributed.start()
    start.start()
    (placement,), images = arguments.placements, arguments.micro_batch
    world = distributed.world_size()
    run = the_run(placement, images * world, quick=arguments.quick)
    # The memory that is planned for a CPU does not depend on its rates.
    rates = replace(CARDS["h100"], name="cpu", bfloat16=False, overlap=False, capability="")
    machine = Machine(
        cluster=Cluster(gpus=world, gpus_per_node=world, nic_gigabits=1.0, nics_per_node=1),
        rates=rates,
    )
    load = workload(run, rates)
    candidate = Candidate(stage=3, teacher=placement, micro_batch_size=images)
    planned = peak_memory(load, candidate, machine)

    before = sum(storages().values())
    job = job_of(run, persistence_threshold=load.threshold)
    config = candidate.deepspeed()
    engine = zero_engine(run, job.make_task, config, micro_batch_size=images)
    batch = noise(images, STUDENT_PIXELS)

    def step() -> None:
        set_learning_rate(engine.deepspeed.optimizer, 1e-4)
        forward_backward(engine, batch, 0)
        engine.deepspeed.step()

    step()
    held_bytes = sum(storages().values()) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        step()
    live = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    mine = {"held_bytes": held_bytes, "peak_bytes": held_bytes + most}
    of_ranks = distributed.gather_objects(mine)
    if distributed.is_main():
        harness.write(
            {
                "ranks": of_ranks,
                "planned": asdict(planned),
                "planned_held_bytes": planned.states + planned.teacher,
                "planned_peak_bytes": planned.total,
                "parameters": {
                    "student": load.parameters,
                    "teachers": sum(load.teacher_sizes),
                },
            },
            arguments.out,
        )
    return distributed.leave(0)


def main() -> int:
    """Starts the ranks of each placement, or runs as one rank; returns the exit code."""
    arguments = parse()
    if arguments.as_rank:
        return measure(arguments)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for placement in arguments.placements:
            path = Path(folder) / f"{placement}.json"
            flags = ["--placements", placement, "--micro-batch", arguments.micro_batch]
            flags += ["--quick"] if arguments.quick else []
            code = harness.start(
                __file__, *flags, "--out", path, "--as-rank", ranks=arguments.ranks
            )
            if code:
                return code
            rows[placement] = json.loads(path.read_text())
    for placement, row in rows.items():
        for kind in ("held", "peak"):
            planned = row[f"planned_{kind}_bytes"]
            most = max(rank[f"{kind}_bytes"] for rank in row["ranks"])
            row[f"{kind}_measured_over_planned"] = most / planned
            print(
                f"{placement}, {kind}: {most / 1e9:.3f} GB measured, {planned / 1e9:.3f} planned, "
                f"{100 * (most / planned - 1):+.1f} %"
            )
    results = {
        **harness.conditions(__file__, __doc__),
        "teachers": [TEACHER] * 3,
        "student": STUDENT,
        "quick": arguments.quick,
        "micro_batch": arguments.micro_batch,
        "placements": rows,
    }
    harness.write(results, arguments.out)
    print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

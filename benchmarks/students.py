"""How much time do two students save by sharing a teacher's forward, against separate runs?

    python benchmarks/students.py [--quick] [--ranks 2] [--stages 1 3]

Two SwinV2 students learn from a SwinV2 teacher of several widths, together and each alone, in
turns; the teacher's forward is also timed by itself. Two separate runs compute the teacher twice,
and a common run saves one of its forwards. The saved share of the seconds is therefore compared
with the share that one forward of the teacher has in the FLOPs, and in the seconds, of the two
runs. The results are ratios of times in the same round. Writes benchmarks/results/students.json and
.png.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import harness

WARM_UP = 2
STUDENTS = {"wide": 64, "narrow": 32}
"""Number of channels of each student's first stage, by the student's name."""


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = harness.step_parser(__file__, __doc__, rounds=12)
    parser.add_argument(
        "--teachers", type=int, nargs="+", default=[96, 192, 288], help="channels of first stages"
    )
    return harness.parse(parser, quick={"rounds": 3, "teachers": [64], "stages": [3]})


def recipe(teacher: int, student: int, size: int) -> Any:
    """Returns the recipe of a SwinV2 student and a SwinV2 teacher.

    Args:
        teacher: Channels of the teacher's first stage.
        student: Channels of the student's first stage.
        size: Side of the images in pixels.
    """
    from fd_large.recipes import registry
    from fd_large.recipes.architectures import Architecture

    run = registry.get("fd_swinv2_base")

    def shape(width: int) -> Architecture:
        heads = tuple(width // 32 * 2**stage for stage in range(4))
        return Architecture(
            embed_dim=width, depths=(2, 2, 6, 2), num_heads=heads, window_size=size // 16
        )

    named = replace(
        run.teacher, architecture=shape(teacher), source="random", placement="replicated"
    )
    return replace(
        run,
        student=replace(run.student, architecture=shape(student)),
        teacher=named,
        data=replace(run.data, image_size=size),
    )


def teachers_share(runs: list[Any], images: int) -> float:
    """Returns the FLOPs of one forward of the teacher, as a share of the FLOPs of all runs' steps.

    Args:
        runs: The recipes, which have the same teacher.
        images: Images of a step.
    """
    from fd_large.engine.counting.count import count
    from fd_large.kernels.choose import Device
    from fd_large.tasks.jobs import job_of

    device = Device(None, on_gpu=False, wish="reference")
    precision = {"bfloat16": False, "frozen_bfloat16": False}
    counts = [count(job_of(run), device, **precision, micro_batch_size=1)[False] for run in runs]
    whole = sum(run_counts.step_flops(images).model for run_counts in counts)
    return counts[0].flops("inference", images) / whole


def run_as_rank(arguments: argparse.Namespace) -> int:
    """Builds all engines and times them in turns; rank 0 writes and prints the results."""
    import torch
    from engines import job_of, noise, seconds_in_turns, zero_engine

    from fd_large.engine.forward_backward import forward_backward
    from fd_large.engine.zero import start
    from fd_large.ranks import distributed

    distributed.start()
    start.start()
    size, images = arguments.image_size, arguments.micro_batch
    batch = noise(images, size)
    engines: dict[tuple[int, int], list[Any]] = {}
    shares: dict[int, float] = {}
    for teacher in arguments.teachers:
        runs = [recipe(teacher, width, size) for width in STUDENTS.values()]
        if distributed.is_main():
            shares[teacher] = teachers_share(runs, images)
        jobs = [job_of(run) for run in runs]
        for job in jobs[1:]:
            job.take_models_of(jobs[0])
        for stage in arguments.stages:
            engines[stage, teacher] = [
                zero_engine(run, job.make_task, f"zero{stage}", micro_batch_size=images)
                for run, job in zip(runs, jobs, strict=True)
            ]

    def alone(engine: Any) -> None:
        forward_backward(engine, batch, 0)
        engine.deepspeed.step()

    def learnt(group: list[Any]) -> Any:
        with torch.no_grad():
            return group[0].task.learnt(batch.images, None)

    def together(group: list[Any]) -> None:
        shared = replace(batch, targets=learnt(group))
        for engine in group:
            forward_backward(engine, shared, 0)
            engine.deepspeed.step()

    contenders: dict[tuple[int, int, str], Any] = {}
    for setting, group in engines.items():
        contenders[*setting, "together"] = partial(together, group)
        contenders[*setting, "teacher"] = partial(learnt, group)
        for name, engine in zip(STUDENTS, group, strict=True):
            contenders[*setting, name] = partial(alone, engine)
    seconds = seconds_in_turns(contenders, arguments.rounds, warm_up=WARM_UP)
    if distributed.is_main():
        rows = []
        for stage, teacher in engines:
            each = [seconds[stage, teacher, name] for name in STUDENTS]
            apart = [sum(pair) for pair in zip(*each, strict=True)]
            ratio = harness.paired(seconds[stage, teacher, "together"], apart)
            of_seconds = harness.paired(seconds[stage, teacher, "teacher"], apart)
            rows.append(
                {
                    "stage": stage,
                    "teacher_channels": teacher,
                    "teachers_share_of_flops": shares[teacher],
                    "teachers_share_of_seconds": of_seconds,
                    "together / apart": ratio,
                    "saved": 1 - ratio["median"],
                }
            )
        results = {
            **harness.conditions(__file__, __doc__),
            "ranks": distributed.world_size(),
            "students": STUDENTS,
            "image_size": size,
            "micro_batch": images,
            "seconds": {" ".join(map(str, n)): harness.spread(s) for n, s in seconds.items()},
            "rows": rows,
        }
        harness.write(results, arguments.out)
        draw(results, arguments.out.with_suffix(".png"))
        for row in rows:
            low, high = row["together / apart"]["quartiles"]
            print(
                f"ZeRO-{row['stage']}, teacher of {row['teacher_channels']} channels: saved "
                f"{row['saved']:.3f} ({1 - high:.3f}-{1 - low:.3f}), its share of FLOPs "
                f"{row['teachers_share_of_flops']:.3f}, of seconds "
                f"{row['teachers_share_of_seconds']['median']:.3f}"
            )
        print(f"written: {arguments.out}")
    return distributed.leave(0)


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws the saved share of the seconds over the teacher's share of the FLOPs.

    The teacher's share of the seconds is drawn, too; whiskers are quartiles.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    most = 0.0
    for stage, color in zip(
        (1, 3, 0, 2), ("#4477aa", "#ee9966", "#228833", "#888888"), strict=True
    ):
        rows = [row for row in results["rows"] if row["stage"] == stage]
        if not rows:
            continue
        shares = [row["teachers_share_of_flops"] for row in rows]
        saved = [row["saved"] for row in rows]
        quartiles = [row["together / apart"]["quartiles"] for row in rows]
        around = [
            [
                max(0.0, share - (1 - high))
                for share, (_, high) in zip(saved, quartiles, strict=True)
            ],
            [max(0.0, (1 - low) - share) for share, (low, _) in zip(saved, quartiles, strict=True)],
        ]
        look = {"fmt": "o-", "capsize": 3, "color": color, "label": f"ZeRO-{stage}: saved"}
        axes.errorbar(shares, saved, yerr=around, **look)
        there = [row["teachers_share_of_seconds"]["median"] for row in rows]
        axes.plot(shares, there, "x", color=color, label=f"ZeRO-{stage}: teacher's share")
        most = max(most, *shares, *saved, *there)
    axes.plot([0, 1.1 * most], [0, 1.1 * most], "--", color="#bbbbbb", label="equal")
    axes.set_xlabel("teacher's forward, once, of the FLOPs of two runs")
    axes.set_ylabel("of the seconds of two runs")
    axes.set_title(f"Two students, {results['ranks']} ranks\n{results['machine']}", size=9)
    axes.legend(frameon=False, fontsize=8)
    harness.save(figure, path)


def main() -> int:
    """Starts the ranks, or runs as one of them with --as-rank; returns the exit code."""
    arguments = parse()
    if arguments.as_rank:
        return run_as_rank(arguments)
    return harness.start(__file__, *sys.argv[1:], "--as-rank", ranks=arguments.ranks)


if __name__ == "__main__":
    sys.exit(main())

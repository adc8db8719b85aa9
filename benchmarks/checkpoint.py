"""How long does training wait for a checkpoint, and how long is a kill before the next step?

    python benchmarks/checkpoint.py [--quick]

Two CPU ranks hold a SwinV2 of more than 100M parameters with master weights and moments under
ZeRO-3. The ranks save in three ways in turns: with this package (a copy to host memory, which a
thread then writes), with this package while training waits for the thread, and with DeepSpeed's
`save_checkpoint`. Then a small run is killed and started again by the same command. Writes
benchmarks/results/checkpoint.json and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
from harness import RESULTS, ROOT

sys.path[:0] = [str(ROOT), *map(str, (ROOT / "tests/support").iterdir())]


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model, few rounds")
    parser.add_argument("--rounds", type=int, default=5, help="saves of each kind")
    parser.add_argument("--kills", type=int, default=3, help="kills of a small run")
    parser.add_argument("--out", type=Path, default=RESULTS / "checkpoint.json")
    parser.add_argument("--as-rank", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def saves(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Saves the engine's state in three ways in turns, and measures how long training waits.

    Every rank has to call this function.

    Args:
        arguments: The flags, with the number of rounds.
        scratch: Folder for the checkpoints.

    Returns: `parameters`, their number, and `seconds`, {way of saving: seconds of each save on the
        slowest rank}.
    """
    import torch
    from engines import zero_engine

    from fd_large.checkpoint.write import Saver
    from fd_large.engine.zero import start, state
    from fd_large.ranks import distributed
    from fd_large.recipes import registry
    from fd_large.recipes.architectures import Architecture
    from fd_large.tasks.distillation.job import DistillationJob

    torch.set_num_threads(1)
    distributed.start()
    start.start()
    run = registry.get("fd_swinv2_base")
    depths = (2, 2, 2, 2) if arguments.quick else (2, 2, 26, 2)
    shape = Architecture(depths=depths, window_size=12)
    run = replace(
        run,
        student=replace(run.student, architecture=shape),
        teacher=replace(run.teacher, source="random"),
    )
    world = distributed.world_size()
    job = DistillationJob(run)
    engine = zero_engine(
        run, lambda: job.task_around(job.make_teachers()), "zero3", micro_batch_size=1
    )
    parameters = sum(state.layout_of(engine).sizes.values())
    seconds: dict[str, list[float]] = {"ours": [], "ours, waiting": [], "deepspeed": []}
    saver = Saver(scratch, keep_last=1, keep_every=0)
    layout = state.layout_of(engine).to_dict()
    list(state.shards(engine))  # This creates the moments, as a first step would.
    for turn in range(arguments.rounds + 1):
        for kind in seconds:
            distributed.barrier()
            begin = time.perf_counter()
            if kind == "deepspeed":
                engine.deepspeed.save_checkpoint(str(scratch / "deepspeed"), tag="state")
                taken = time.perf_counter() - begin
            else:
                manifest = {
                    "update": turn,
                    "samples": 0,
                    "world_size": world,
                    "zero_stage": 3,
                    "teacher_hash": "",
                    "layout": layout,
                }
                saver.begin(manifest, state.shards(engine))
                taken = time.perf_counter() - begin
                saver.wait()
                failed = distributed.any_rank(saver.failed)
                # Training also waits for the commit, some steps later.
                before_commit = time.perf_counter()
                saver.finish(failed_anywhere=failed)
                taken += time.perf_counter() - before_commit
                if kind == "ours, waiting":
                    taken = time.perf_counter() - begin
                saver.close()
            distributed.barrier()
            if turn:  # The first round warms the page cache and the allocator.
                seconds[kind].append(distributed.max_rank(taken))
    return {"parameters": parameters, "seconds": seconds}


def restarts(kills: int, scratch: Path) -> list[dict[str, float]]:
    """Kills a small run several times, and starts the same command again after each kill.

    Args:
        kills: Number of kills.
        scratch: Folder for the images and the run.

    Returns: for each kill, the `seconds` from the kill to the first new step, and `updates_lost`,
        the number of steps after the newest checkpoint.
    """
    import signal

    import twin
    from pictures import write_pictures

    images = write_pictures(scratch / "images", 26)
    run_dir = scratch / "run"
    flags = ("--optim.max_steps", "4000", "--runtime.save_every", "4")
    rows = run_dir / "metrics.jsonl"

    def lines() -> int:
        return len(rows.read_text().splitlines()) if rows.exists() else 0

    def wait_past(count: int) -> None:
        while lines() <= count:
            time.sleep(0.02)

    times = []
    started = twin.start(images, run_dir, *flags)
    try:
        wait_past(6)
        for _ in range(kills):
            for process in started.processes:
                os.kill(process.pid, signal.SIGKILL)
            begin, before = time.perf_counter(), lines()
            started.kill()
            stored = max(int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step_????????"))
            started = twin.start(images, run_dir, *flags)
            while lines() > stored:  # The resumed run cuts the rows that it will repeat.
                time.sleep(0.02)
            wait_past(stored)
            first = time.perf_counter() - begin
            times.append({"seconds": first, "updates_lost": before - stored})
            wait_past(stored + 6)
    finally:
        started.kill()
    return times


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws a box plot of how long training waits for each way of saving."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {
        "ours": "fd_large",
        "ours, waiting": "fd_large,\nwriting awaited",
        "deepspeed": "DeepSpeed's\nsave_checkpoint",
    }
    figure, axes = plt.subplots(figsize=(6.4, 3.4), layout="constrained")
    samples = [results["seconds"][kind] for kind in names]
    axes.boxplot(samples, orientation="horizontal", widths=0.5, medianprops={"color": "#bb5566"})
    axes.set_yticks(range(1, len(names) + 1), list(names.values()))
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds that training waits for a checkpoint")
    axes.set_title(
        f"{results['parameters'] / 1e6:.0f}M parameters, ZeRO-3 on 2 CPU ranks, "
        f"{results['checkpoint_gigabytes']:.1f} GB",
        size=10,
    )
    harness.save(figure, path)


def main() -> int:
    """Starts the ranks, or runs as one of them with --as-rank; returns the exit code."""
    arguments = parse()
    if arguments.quick:
        arguments.rounds, arguments.kills = 2, 1
    if arguments.as_rank:
        measured = saves(arguments, arguments.as_rank)
        from fd_large.ranks import distributed

        if distributed.is_main():
            (arguments.as_rank / "found.json").write_text(json.dumps(measured))
        return distributed.leave(0)
    scratch = Path(tempfile.mkdtemp(prefix="checkpoint_benchmark_"))
    try:
        harness.start(__file__, *sys.argv[1:], "--as-rank", scratch, ranks=2)
        measured = json.loads((scratch / "found.json").read_text())
        kills = restarts(arguments.kills, scratch)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    seconds = measured["seconds"]
    ratios = {
        kind: [a / b for a, b in zip(seconds["ours"], seconds[kind], strict=True)]
        for kind in ("ours, waiting", "deepspeed")
    }
    results = {
        **harness.conditions(__file__, __doc__),
        "parameters": measured["parameters"],
        "checkpoint_gigabytes": 12 * measured["parameters"] / 1e9,
        "seconds": seconds,
        "median_seconds": {kind: statistics.median(v) for kind, v in seconds.items()},
        "stall_relative_to": {
            kind: {"median": statistics.median(v), "all": v} for kind, v in ratios.items()
        },
        "kill_to_next_update": kills,
    }
    harness.write(results, arguments.out)
    draw(results, arguments.out.with_suffix(".png"))
    for kind, value in results["median_seconds"].items():
        print(f"{kind}: {value:.2f} s")
    for kind, value in results["stall_relative_to"].items():
        print(f"stall / {kind}: {value['median']:.2f}")
    print("kill to next step:", ", ".join(f"{k['seconds']:.1f} s" for k in kills))
    return 0


if __name__ == "__main__":
    sys.exit(main())

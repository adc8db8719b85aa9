"""How many images per second do this engine and others reach in a distillation step?

    python benchmarks/throughput.py [--quick] [--ranks 2] [--model swinv2_tiny] [--image-size 128]
        [--micro-batch 8] [--precision float32] [--contenders zero1 ddp ...] [--small]
        [--peer-repo PATH]

It starts its own ranks (one per GPU, or `--ranks` CPU ranks; or with `--launcher "srun
--nodes=4"`), builds all contenders (contenders.py) in the same processes, and times them in turns,
so that other work on the machine affects all alike. The student is a SwinV2, and the teacher a Swin
of the same widths with random weights, whole on every rank. Images are uint8 noise in memory, so
that no loader is measured. `--ranks 1` compares the engine with the plain torch step.

Then each contender runs alone in fresh ranks, to measure its peak memory. Prints a table and writes
benchmarks/results/throughput_RANKS_PRECISION.json, .csv and .png.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import harness
from harness import PEERS, RESULTS, TITLES

WARM_UP = 2
# Where what a step costs whatever its images shows most.
SMALL = ("--image-size", "64", "--micro-batch", "2")
GIGABYTE = 1e9


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, small images")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks where there is no GPU")
    parser.add_argument(
        "--launcher", default="", help="command that starts the ranks; default: torchrun"
    )
    parser.add_argument("--model", default="swinv2_tiny", help="the student, a SwinV2")
    parser.add_argument(
        "--width", type=int, default=0, help="channels of its first stage; 0: its own"
    )
    parser.add_argument("--image-size", type=int, default=128, help="pixels, a multiple of 64")
    parser.add_argument("--micro-batch", type=int, default=8, help="images per rank and step")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--rounds", type=int, default=12, help="measured steps of each contender")
    parser.add_argument("--contenders", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument(
        "--small", action="store_true", help="also a step of two images of 64 px per rank"
    )
    parser.add_argument("--peer-repo", type=Path, help="a checkout of Feature-Distillation")
    parser.add_argument("--no-memory", action="store_true", help="measure speed only")
    parser.add_argument(
        "--out", type=Path, help="the JSON file; .csv and .png are written beside it"
    )
    parser.add_argument("--as-rank", action="store_true", help="this process is already a rank")
    parser.add_argument("--alone", default="", help=argparse.SUPPRESS)
    if parser.parse_args().quick:
        parser.set_defaults(rounds=4, image_size=64, micro_batch=2)
    return parser.parse_args()


def chosen(arguments: argparse.Namespace, world: int) -> list[str]:
    """Returns the names of the contenders in the order in which they are built.

    Args:
        arguments: The flags.
        world: Number of ranks.
    """
    contenders = arguments.contenders or [n for n in TITLES if n != "peer" or arguments.peer_repo]
    unknown = [name for name in contenders if name not in TITLES]
    if unknown:
        sys.exit(
            f"--contenders: unknown name; got {unknown[0]}, expected some of {', '.join(TITLES)}."
        )
    if world == 1 and not arguments.contenders:
        contenders = [name for name in contenders if name in ("alone", "zero0", "zero1", "peer")]
    return [name for name in TITLES if name in contenders]


def run_as_rank(arguments: argparse.Namespace) -> int:
    """Measures the speed of all contenders, or with --alone the memory of one contender.

    Rank 0 writes the results to --out. Returns the exit code.
    """
    from contenders import Setting, Unavailable, build, share
    from engines import noise, seconds_in_turns

    from fd_large.engine.zero import start
    from fd_large.ranks import distributed

    distributed.start()
    start.start()
    world, size = distributed.world_size(), arguments.image_size
    before = _memory(reset=True)
    setting: Setting = share(
        arguments.model,
        arguments.width,
        size,
        arguments.micro_batch,
        arguments.precision,
        arguments.peer_repo,
    )
    batch = noise(arguments.micro_batch, size)
    steps, left_out, losses = {}, {}, {}
    for name in [arguments.alone] if arguments.alone else chosen(arguments, world):
        try:
            steps[name] = build(name, setting)
        except Unavailable as error:
            left_out[name] = str(error)
            continue
        # They compute the same: compare the losses before and after the first step.
        sums = [distributed.sum_tensor(steps[name](batch)) for _ in range(WARM_UP)]
        losses[name] = [total.item() / distributed.world_size() for total in sums]
    results: dict[str, Any] = {"left_out": left_out}
    if arguments.alone and steps:
        _memory(reset=True)
        for step in list(steps.values()) * 2:
            step(batch)
        results["peak_memory_bytes"] = distributed.max_rank(_memory() - before)
    elif steps:
        calls = {name: partial(step, batch) for name, step in steps.items()}
        seconds = seconds_in_turns(calls, arguments.rounds)
        results |= report(arguments, setting, seconds)
        for name, values in losses.items():
            results["contenders"][name]["first_losses"] = values
    if distributed.is_main():
        arguments.out.write_text(json.dumps(results, indent=1) + "\n")
    return distributed.leave(0)


def _memory(*, reset: bool = False) -> int:
    """Returns this rank's peak of memory in bytes, on its GPU or else of its process.

    Args:
        reset: Whether to reset the peak before.
    """
    import torch

    from fd_large.engine.memory import HostMemory
    from fd_large.ranks import distributed

    if distributed.device().type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    memory = HostMemory()
    if reset:
        memory.reset()
    return memory.peak()


def report(
    arguments: argparse.Namespace, setting: Any, seconds: dict[str, list[float]]
) -> dict[str, Any]:
    """Returns the results, with the speed of each contender relative to the fastest.

    On several ranks, the step without communication does not count as the fastest, since it trains
    a different model on each rank.

    Args:
        arguments: The flags.
        setting: Models, batch and precision.
        seconds: The seconds of each contender's steps.
    """
    from fd_large.ranks import distributed

    world = distributed.world_size()
    images = arguments.micro_batch * world
    # Without communication several ranks train several models: a bound, not a contender.
    whole = [name for name in seconds if world == 1 or name != "alone"] or list(seconds)
    medians = {name: harness.spread(seconds[name])["median"] for name in seconds}
    fastest = min(whole, key=medians.__getitem__)
    rows: dict[str, Any] = {}
    for name, samples in seconds.items():
        rows[name] = {
            "images_per_second": images / medians[name],
            "seconds": harness.spread(samples),
            "relative_speed": harness.paired(seconds[fastest], samples),
        }
        if PEERS.get(name) in seconds:
            rows[name]["time_over_peer"] = harness.paired(samples, seconds[PEERS[name]])
    return {
        **harness.conditions(__file__, __doc__),
        "ranks": world,
        "nodes": world // distributed.local_world_size(),
        "model": arguments.model,
        "trained_parameters": sum(p.numel() for p in setting.make_task().parameters()),
        "image_size": arguments.image_size,
        "micro_batch": arguments.micro_batch,
        "precision": "bfloat16" if setting.bfloat16 else "float32",
        "fastest": fastest,
        "contenders": rows,
    }


def start_ranks(arguments: argparse.Namespace) -> int:
    """Measures the speed of all contenders together, then the memory of each in new ranks.

    Returns: the exit code, after the results were written and printed.
    """
    words = [word for word in sys.argv[1:] if word != "--as-rank"]
    with tempfile.TemporaryDirectory(prefix="throughput_") as folder:
        part = Path(folder) / "part.json"

        def run(*more: str) -> dict[str, Any]:
            part.unlink(missing_ok=True)
            code = harness.start(
                __file__, *words, "--out", part, "--as-rank", *more,
                ranks=arguments.ranks, launcher=arguments.launcher,
            )  # fmt: skip
            # Occasionally a rank aborts at exit, when all work is done.
            if not part.exists():
                sys.exit(f"{' '.join(more) or 'throughput'}: the ranks ended with {code}")
            return json.loads(part.read_text())

        results = run()
        if "contenders" not in results:
            sys.exit("; ".join(f"{n}: {why}" for n, why in results["left_out"].items()))
        results["command"] = " ".join(["python benchmarks/throughput.py", *sys.argv[1:]])
        if arguments.small:
            results["small_step"] = run(*SMALL)
        for name in () if arguments.no_memory else results["contenders"]:
            results["contenders"][name]["peak_memory_bytes"] = run("--alone", name)[
                "peak_memory_bytes"
            ]
    name = f"throughput_{results['ranks']}_{results['precision']}.json"
    out = arguments.out or RESULTS / name
    harness.write(results, out)
    write_csv(results, out.with_suffix(".csv"))
    draw(results, out.with_suffix(".png"))
    for step in (results, *([results["small_step"]] if arguments.small else [])):
        show(step)
    print(f"written: {out}, .csv and .png")
    return 0


def sorted_rows(results: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Returns a pair (title, results) for each contender in `results`, the fastest first."""
    rows = results["contenders"].items()
    ordered = sorted(rows, key=lambda row: -row[1]["images_per_second"])
    return [(_title(name, results), row) for name, row in ordered]


def _title(name: str, results: dict[str, Any]) -> str:
    return "plain torch" if name == "alone" and results["ranks"] == 1 else TITLES[name]


def show(results: dict[str, Any]) -> None:
    """Prints the table of all contenders, and the names of contenders that were left out."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=subtitle(results), title_justify="left")
    for name in (
        "contender",
        "images/s",
        "s per step (quartiles)",
        "relative speed",
        "time, peer 1",
        "peak memory",
    ):
        table.add_column(name, justify="left" if name == "contender" else "right", no_wrap=True)
    for title, row in sorted_rows(results):
        memory = row.get("peak_memory_bytes")
        over = row.get("time_over_peer")
        table.add_row(
            title,
            f"{row['images_per_second']:.2f}",
            _spread(row["seconds"]),
            _spread(row["relative_speed"]),
            _spread(over) if over else "-",
            "-" if memory is None else f"{memory / GIGABYTE:.2f} GB",
        )
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    for name, why in results["left_out"].items():
        console.print(f"left out: {TITLES[name]}: {why}", soft_wrap=True)


def _spread(sample: dict[str, Any]) -> str:
    low, high = sample["quartiles"]
    return f"{sample['median']:.3f} ({low:.3f}-{high:.3f})"


def subtitle(results: dict[str, Any]) -> str:
    """Returns two lines with the models, sizes and machine in `results`, for table and plot."""
    return (
        f"{results['model']} ({results['trained_parameters'] / 1e6:.1f}M trained), "
        f"{results['image_size']} px, {results['micro_batch']} images per rank, "
        f"{results['precision']}, {results['ranks']} rank(s)\n"
        f"{results['machine']}; load average {results['load_average']:.1f}"
    )


def write_csv(results: dict[str, Any], path: Path) -> None:
    """Writes a CSV file with a line for each contender, the fastest first."""
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(
            ["contender", "images_per_second", "seconds_median", "seconds_lower_quartile",
             "seconds_upper_quartile", "relative_speed", "peak_memory_bytes"]
        )  # fmt: skip
        for title, row in sorted_rows(results):
            rows.writerow(
                [
                    title,
                    f"{row['images_per_second']:.4f}",
                    f"{row['seconds']['median']:.4f}",
                    *(f"{value:.4f}" for value in row["seconds"]["quartiles"]),
                    f"{row['relative_speed']['median']:.4f}",
                    row.get("peak_memory_bytes", ""),
                ]
            )


def draw(results: dict[str, Any], path: Path) -> None:
    """Draws a bar for the speed of each contender and, if measured, for its memory.

    Whiskers are quartiles.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = sorted_rows(results)
    titles = [title for title, _ in rows]
    colors = ["#4477aa" if title.startswith("fd_large") else "#bbbbbb" for title in titles]
    images = results["micro_batch"] * results["ranks"]
    speeds = [row["images_per_second"] for _, row in rows]
    bounds = [row["seconds"]["quartiles"] for _, row in rows]
    around = [
        [speed - images / slow for speed, (_, slow) in zip(speeds, bounds, strict=True)],
        [images / fast - speed for speed, (fast, _) in zip(speeds, bounds, strict=True)],
    ]
    memory = [row.get("peak_memory_bytes", 0) / GIGABYTE for _, row in rows]
    panels = 2 if any(memory) else 1
    figure, grid = plt.subplots(
        1, panels, figsize=(4.6 * panels + 1.2, 0.42 * len(rows) + 1.6),
        layout="constrained", sharey=True, squeeze=False,
    )  # fmt: skip
    values = [(speeds, around, "images per second, all ranks", "{:.1f}")]
    values.append((memory, None, "peak memory of a rank, GB", "{:.2f}"))
    for axes, (numbers, whiskers, label, form) in zip(grid[0], values, strict=False):
        axes.barh(titles, numbers, xerr=whiskers, capsize=3, color=colors, height=0.66)
        for place, number in enumerate(numbers):
            axes.text(number * 0.03, place, form.format(number), va="center", size=9)
        axes.set_xlabel(label)
    grid[0][0].invert_yaxis()
    figure.suptitle(subtitle(results), size=9)
    harness.save(figure, path)


def main() -> int:
    """Starts the ranks, or runs as one of them with --as-rank; returns the exit code."""
    arguments = parse()
    return run_as_rank(arguments) if arguments.as_rank else start_ranks(arguments)


if __name__ == "__main__":
    sys.exit(main())

"""How long does a table of 3 rows and 5 columns take from end to end on two cores?

    python benchmarks/transfer.py [--quick] [--ranks 2] [--seeds 3]

It runs `transfer` on the stored run of a tiny SwinV2 and its teacher, a tiny ViT, with toy datasets
in the layouts of ImageNet, ADE20K, COCO and NYUv2, which it makes. Student, teacher and random
weights are trained for fine-tuning, linear probe, segmentation, detection and depth, each in a run
of its own with a test at its end. Nothing was distilled, so that the scores mean nothing; the
seconds show what the command costs. The results also have the recipe of each cell and the intervals
of the differences. Then the command runs a second time, when all cells are finished. Writes
benchmarks/results/transfer.json and a plot.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
from harness import RESULTS, ROOT

COLUMNS = 5
COLOURS = ("#0072B2", "#D55E00", "#5f5f5f")


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="three steps of each training")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks where there is no GPU")
    parser.add_argument("--steps", type=int, default=40, help="steps of each training")
    parser.add_argument("--seeds", type=int, default=1, help="repetitions of each training")
    parser.add_argument("--out", type=Path, default=RESULTS / "transfer.json")
    if parser.parse_args().quick:
        parser.set_defaults(steps=3)
    return parser.parse_args()


def main() -> int:
    """Runs the command twice, and writes the seconds; returns the exit code."""
    flags = parse()
    sys.path[:0] = map(str, (ROOT / "tests/support").iterdir())
    import transfer_toy

    with tempfile.TemporaryDirectory(prefix="transfer_") as folder:
        toy, out = transfer_toy.write_toy(Path(folder), count=24), Path(folder) / "table"
        words = [*transfer_toy.words(toy, out), "--optim.max_steps", flags.steps]
        words += ["--batch.micro_batch_size", 4 // flags.ranks, "--runtime.save_every", 1000]
        words += ["--seeds", flags.seeds]
        seconds = []
        for _ in range(2):
            begin = time.monotonic()
            code = harness.start(str(ROOT / "fd_large/__main__.py"), *words, ranks=flags.ranks)
            seconds.append(time.monotonic() - begin)
            if code:
                sys.exit(f"transfer: the ranks ended with {code}")
        table = json.loads((out / "summary.json").read_text())
        done = [cell for cell in table["cells"] if cell["status"] == "done"]
        of_each: dict[str, float] = {}
        for cell in done:
            name = f"{cell['row']}/{cell['column']}"
            share = _seconds(Path(cell["run"])) / flags.seeds
            of_each[name] = round(of_each.get(name, 0) + share, 1)
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        result = {
            **harness.conditions(__file__, __doc__),
            "ranks": flags.ranks,
            "steps": flags.steps,
            "rows": len(table["rows"]),
            "columns": COLUMNS,
            "trainings": len(done),
            "seconds": seconds[0],
            "seconds_of_a_second_start": seconds[1],
            "seconds_of_each_training": of_each,
            "seeds": flags.seeds,
            "cells": [_of_cell(cell) for cell in done],
            "differences": table["differences"],
        }
        harness.write(result, flags.out)
        draw(result, flags.out.with_suffix(".png"))
        print(f"{len(done)} trainings in {seconds[0]:.0f} s; again in {seconds[1]:.0f} s")
    return 0


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws a bar for the seconds of each training, in a group for each column."""
    from matplotlib.figure import Figure

    of_each = result["seconds_of_each_training"]
    rows, columns = (list(dict.fromkeys(key.split("/")[n] for key in of_each)) for n in (0, 1))
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    for place, (row, colour) in enumerate(zip(rows, COLOURS, strict=True)):
        at = [number + 0.27 * (place - 1) for number in range(len(columns))]
        values = [of_each[f"{row}/{column}"] for column in columns]
        bars = axes.bar(at, values, width=0.25, color=colour, label=row.replace("_", " "))
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    axes.set_xticks(range(len(columns)), columns)
    axes.set_ylabel("seconds, test included")
    axes.set_title(
        f"{result['trainings']} trainings of {result['steps']} steps: {result['seconds']:.0f} s in "
        f"all, on {result['machine']}",
        loc="left",
        fontsize=11,
    )
    axes.legend(frameon=False, loc="upper left")
    harness.save(figure, path)


def _seconds(run: Path) -> float:
    """Returns the seconds of a training, by the times at which two files were written.

    Args:
        run: Folder of the run, in which cell.json is written first and summary.json last.
    """
    times = [(run / name).stat().st_mtime for name in ("cell.json", "summary.json")]
    return times[1] - times[0]


def _of_cell(cell: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of `cell`, a cell's entry in summary.json, for the benchmark's results.

    It has only the row, the column, the seed, the recipe, its differences and the scores.
    """
    names = ("row", "column", "seed", "recipe", "unlike_first", "scores")
    return {name: cell[name] for name in names}


if __name__ == "__main__":
    sys.exit(main())

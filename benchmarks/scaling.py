"""How does the speed of a step grow with the number of nodes, over several runs of throughput.py?

    python benchmarks/scaling.py THROUGHPUT.json ... [--out benchmarks/results/scaling.csv]

`sbatch slurm/throughput.sh` makes the files, one per number of nodes, and calls this program.
Efficiency is images per second and rank, relative to the smallest run. Writes a .csv and a .png.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import harness
from harness import RESULTS, TITLES

SAME = ("model", "image_size", "micro_batch", "precision", "machine")


def table_of(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns a row for each contender and number of ranks, the fewest ranks first.

    Args:
        runs: Results of throughput.py.

    Raises: SystemExit: if the runs differ in a setting of `SAME`.
    """
    for key in SAME:
        if len({run[key] for run in runs}) > 1:
            sys.exit(f"scaling: the runs differ in {key}; got {[run[key] for run in runs]}.")
    runs = sorted(runs, key=lambda run: run["ranks"])
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run["contenders"]):
        with_it = [run for run in runs if name in run["contenders"]]
        first = with_it[0]["contenders"][name]["images_per_second"] / with_it[0]["ranks"]
        for run in with_it:
            speed = run["contenders"][name]["images_per_second"]
            rows.append(
                {
                    "contender": name,
                    "nodes": run["nodes"],
                    "ranks": run["ranks"],
                    "images_per_second": speed,
                    "efficiency": speed / run["ranks"] / first,
                }
            )
    return rows


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Prints a table with a row for each contender and a column for each number of ranks."""
    from rich.console import Console
    from rich.table import Table

    sizes = list(dict.fromkeys((row["nodes"], row["ranks"]) for row in rows))
    table = Table(title=title, title_justify="left")
    table.add_column("images/s (efficiency)", no_wrap=True)
    for nodes, ranks in sorted(sizes):
        table.add_column(f"{nodes} node(s), {ranks} ranks", justify="right", no_wrap=True)
    for name in dict.fromkeys(row["contender"] for row in rows):
        by_ranks = {row["ranks"]: row for row in rows if row["contender"] == name}
        cells = [
            "{images_per_second:.1f} ({efficiency:.0%})".format(**by_ranks[ranks])
            if ranks in by_ranks
            else "-"
            for _, ranks in sorted(sizes)
        ]
        table.add_row(TITLES[name], *cells)
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Draws images per second over ranks on logarithmic axes, with lines of ideal scaling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for name in dict.fromkeys(row["contender"] for row in rows):
        points = [row for row in rows if row["contender"] == name]
        ranks = [row["ranks"] for row in points]
        speeds = [row["images_per_second"] for row in points]
        (line,) = axes.plot(ranks, speeds, marker="o", label=TITLES[name])
        ideal = [speeds[0] * count / ranks[0] for count in ranks]
        axes.plot(ranks, ideal, ":", color=line.get_color(), linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(sorted({row["ranks"] for row in rows}))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.minorticks_off()
    axes.set_xlabel("ranks")
    axes.set_ylabel("images per second, all ranks")
    axes.set_title(f"{title}\ndotted: ideal scaling from the first point", size=9)
    axes.legend(frameon=False, fontsize=8)
    harness.save(figure, path)


def main() -> int:
    """Reads the results, and writes the table and the plot; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="THROUGHPUT.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.csv")
    arguments = parser.parse_args()
    runs = [json.loads(path.read_text()) for path in arguments.files]
    runs = [run for run in runs if "contenders" in run]
    if not runs:
        sys.exit(f"scaling: no measured run in {', '.join(map(str, arguments.files))}.")
    rows = table_of(runs)
    of = runs[0]
    title = (
        f"{of['model']}, {of['image_size']} px, {of['micro_batch']} images per rank, "
        f"{of['precision']}; {of['machine']}"
    )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        lines = csv.DictWriter(file, rows[0], lineterminator="\n")
        lines.writeheader()
        lines.writerows(rows)
    draw(rows, title, arguments.out.with_suffix(".png"))
    show(rows, title)
    print(f"written: {arguments.out} and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Models side by side: a table and a picture of their accuracies, from summary.json alone."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fd_large.report import style

if TYPE_CHECKING:
    from rich.table import Table

TITLES = {
    "knn": "nearest neighbours",
    "linear": "linear probe",
    "finetune": "fine-tuning",
}
COLORS = (style.BLUE, style.VERMILLION, style.GREEN, style.GREY)


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean, and the standard deviation of single seeds (None of one)."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_deviation": deviation}


def table(summary: dict[str, Any]) -> Table:
    """Returns the rich table: a model a row."""
    from rich.table import Table
    from rich.text import Text

    several = len(summary["nets"][0]["accuracy"]) > 1
    found = Table(
        title=f"Accuracy by {TITLES[summary['task']]}, per cent of the test pictures",
        title_justify="left",
    )
    found.add_column("net", overflow="fold")
    found.add_column("pixels", justify="right")
    found.add_column("mean" if several else "accuracy", justify="right")
    if several:
        found.add_column("+-", justify="right")
        found.add_column("seeds", justify="right", overflow="fold")
    for net in summary["nets"]:
        cells = [Text(net["label"]), str(net["image_size"]), f"{net['mean']:.2f}"]
        if several:
            cells.append(f"{net['standard_deviation']:.2f}")
            cells.append(" ".join(f"{value:.2f}" for value in net["accuracy"]))
        found.add_row(*cells)
    return found


def draw_comparison(summary: dict[str, Any], path: Path) -> None:
    """Draws a row for each model: a dot a seed, their mean as a line, with its number."""
    from matplotlib.figure import Figure

    nets = summary["nets"]
    figure = Figure(figsize=(8.0, 1.6 + 0.5 * len(nets)), dpi=style.DPI, layout="constrained")
    axes = figure.subplots()
    values = [value for net in nets for value in net["accuracy"]]
    low, high = min(values), max(values)
    margin = max(0.12 * (high - low), 0.5)
    for row, net in enumerate(nets):
        color = COLORS[row % len(COLORS)]
        axes.plot([net["mean"]] * 2, [row - 0.25, row + 0.25], color=color, linewidth=2.5)
        axes.plot(net["accuracy"], [row] * len(net["accuracy"]), "o", color=color, markersize=6)
        told = f"{net['mean']:.2f}"
        if net["standard_deviation"] is not None:
            told += f" \u00b1 {net['standard_deviation']:.2f}"
        axes.annotate(
            told,
            (max(net["accuracy"]), row),
            xytext=(10, 0),
            textcoords="offset points",
            va="center",
            fontsize=style.TEXT_SIZE,
            color=color,
        )
    axes.set_yticks(range(len(nets)), [net["label"] for net in nets])
    axes.set_ylim(len(nets) - 0.5, -0.5)
    # Room for the numbers to the right.
    axes.set_xlim(max(0.0, low - margin), high + 3 * margin)
    axes.set_xlabel("accuracy on the test pictures, per cent", fontsize=style.TEXT_SIZE)
    title = f"{TITLES[summary['task']].capitalize()}: {_seeds(summary)}"
    axes.set_title(title, fontsize=style.TITLE_SIZE, loc="left")
    style.plain_axes(axes)
    axes.grid(axis="x", color=style.LIGHT_GREY, linewidth=0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelsize=style.TEXT_SIZE, length=0)
    figure.savefig(path)


def _seeds(summary: dict[str, Any]) -> str:
    count = len(summary["nets"][0]["accuracy"])
    if count == 1:
        return "one number a model"
    return f"{count} seeds; a dot is one, a line their mean \u00b1 standard deviation"

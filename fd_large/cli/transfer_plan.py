"""`transfer --plan`: what every training of the table costs, and all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd
from typing import NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from fd_large.cli.plan import plan
from fd_large.cli.plan_report import figure
from fd_large.cli.plan_workload import steps_of
from fd_large.errors import FDError, first_line
from fd_large.plan.cluster import Cluster
from fd_large.recipes.run import Run

_NODE = 8


class Cost(NamedTuple):
    """What a training costs.

    Attributes:
        steps: Its steps.
        gpus: GPUs that it is planned on.
        hours: GPU-hours of its steps; None: it does not fit, or cannot be planned.
        memory_bytes: Memory of a rank.
        why: Why there are no hours.
    """

    steps: int
    gpus: int
    hours: float | None
    memory_bytes: float = 0.0
    why: str = ""


def cost_of(run: Run, images: int, *, gpus: int, gpu: str) -> Cost:
    """Plans a run in its fastest setting.

    Args:
        run: The recipe.
        images: Training images of the dataset, which decide the steps of an epoch.
        gpus: GPUs at most; as many are taken as divide them and the images of a step.
        gpu: Name of the card.
    """
    ranks, steps = gcd(run.batch.global_batch_size, gpus), steps_of(run, images)
    node = gcd(ranks, _NODE)
    cluster = Cluster(gpus=ranks, gpus_per_node=node, nic_gigabits=400.0, nics_per_node=node)
    try:
        _, _, good, _ = plan(run, cluster, gpu=gpu)
    except FDError as error:
        return Cost(steps, ranks, None, why=first_line(error))
    if not good:
        return Cost(steps, ranks, None, why="no setting fits into memory")
    best = good[0]
    hours = best.seconds.total * steps / 3600 * ranks
    return Cost(steps, ranks, hours, best.memory.total)


def report(
    costs: Sequence[tuple[str, str, Run, Cost]], *, columns: Iterable[str], seeds: int, gpu: str
) -> Group:
    """Returns what is printed.

    Args:
        costs: Label of the row, title of the column, recipe and cost of each training of a seed.
        columns: The titles of the columns, in order.
        seeds: Number of repetitions.
        gpu: Name of the card.
    """
    columns = list(columns)
    table = Table(title=f"GPU-hours of the table on {gpu}, one seed", title_justify="left")
    for name in ("model", *columns, "all"):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    found = {(row, column): cost for row, column, _, cost in costs}
    rows = list(dict.fromkeys(row for row, _ in found))
    for row in rows:
        own = [found.get((row, column)) for column in columns]
        table.add_row(row, *map(_hours, own), _sum(own))
    table.add_section()
    of_columns = [[found.get((row, column)) for row in rows] for column in columns]
    total = list(found.values())
    table.add_row("all", *map(_sum, of_columns), _sum(total))
    each = Table(title="Each training", title_justify="left")
    for name in ("recipe", "model", "steps", "GPUs", "GB per rank", "time"):
        each.add_column(name, justify="left" if name in ("recipe", "model") else "right")
    for row, _, run, cost in costs:
        time = _time(cost.hours / cost.gpus) if cost.hours is not None else "-"
        memory = f"{cost.memory_bytes / 1e9:.1f}" if cost.hours is not None else "-"
        each.add_row(run.name, row, f"{cost.steps:,}", str(cost.gpus), memory, time)
    lines = ["Training alone: starts, tests and checkpoints are not in it."]
    if seeds > 1:
        lines.append(f"{seeds} seeds: {_sum(total, times=seeds)} GPU-hours.")
    lines += [f"{run.name}, {row}: {c.why}" for row, _, run, c in costs if c.hours is None]
    return Group(table, each, Text("\n".join(lines)))


def _time(hours: float) -> str:
    return f"{figure(hours)} h" if hours < 24 else f"{figure(hours / 24)} days"


def _hours(cost: Cost | None) -> str:
    if cost is None:
        return ""
    return "-" if cost.hours is None else figure(cost.hours)


def _sum(costs: Iterable[Cost | None], *, times: int = 1) -> str:
    return figure(times * sum(cost.hours or 0.0 for cost in costs if cost))

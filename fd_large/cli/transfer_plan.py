"""Estimates the costs of each training of the table and their sum, for `transfer --plan`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import gcd
from typing import NamedTuple

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fd_large.cli.plan import plan
from fd_large.cli.plan_report import figures
from fd_large.cli.plan_workload import steps_of
from fd_large.errors import FDError, first_line
from fd_large.plan.cluster import Cluster
from fd_large.plan.step_time import Between
from fd_large.recipes.run import Run

_NODE = 8


class Cost(NamedTuple):
    """Estimated cost of a training.

    Attributes:
        steps: Number of steps.
        gpus: Number of GPUs of the plan.
        hours: Range of GPU-hours of all steps, or None if the training does not fit in memory or
            cannot be planned.
        memory_bytes: Memory of a rank in bytes.
        why: Reason why `hours` is None, without a remedy, since the user does not set the model.
    """

    steps: int
    gpus: int
    hours: Between | None
    memory_bytes: float = 0.0
    why: str = ""


def cost_of(run: Run, images: int, *, gpus: int, gpu: str) -> Cost:
    """Returns the cost of a training with the fastest settings that fit.

    The number of training images, `images`, decides the steps of an epoch. The plan uses the
    greatest common divisor of `gpus` and the global batch size as the number of GPUs.
    """
    ranks, steps = gcd(run.batch.global_batch_size, gpus), steps_of(run, images)
    node = gcd(ranks, _NODE)
    cluster = Cluster(gpus=ranks, gpus_per_node=node, nic_gigabits=400.0, nics_per_node=node)
    try:
        _, _, good, _ = plan(run, cluster, gpu=gpu)
    except FDError as error:
        return Cost(steps, ranks, None, why=first_line(error).rsplit(". ", 1)[0])
    if not good:
        return Cost(steps, ranks, None, why="no setting fits into memory")
    best = good[0]
    hours = best.seconds.between.scaled(steps / 3600 * ranks)
    return Cost(steps, ranks, hours, best.memory.total)


def report(costs: Sequence[tuple[str, str, Run, Cost]], *, seeds: int, gpu: str) -> Group:
    """Returns the report that is printed.

    Args:
        costs: The row's label, the column's name, the recipe and the cost of each training of one
            seed.
        seeds: Number of seeds, by which the total is multiplied.
    """
    columns = list(dict.fromkeys(column for _, column, _, _ in costs))
    table = _table(f"GPU-hours of the table on {gpu}, one seed", ("model", *columns, "all"))
    costs_by_cell = {(row, column): cost for row, column, _, cost in costs}
    rows = list(dict.fromkeys(row for row, _ in costs_by_cell))
    for row in rows:
        row_costs = [costs_by_cell.get((row, column)) for column in columns]
        table.add_row(row, *map(_hours, row_costs), _sum(row_costs))
    table.add_section()
    of_columns = [[costs_by_cell.get((row, column)) for row in rows] for column in columns]
    total = list(costs_by_cell.values())
    table.add_row("all", *map(_sum, of_columns), _sum(total))
    names = ("recipe", "model", "steps", "GPUs", "GB per\nrank", "time")
    each = _table("Each training", names)
    for row, _, run, cost in costs:
        time = _time(cost.hours.scaled(1 / cost.gpus)) if cost.hours is not None else "-"
        memory = f"{cost.memory_bytes / 1e9:.1f}" if cost.hours is not None else "-"
        each.add_row(run.name, row, f"{cost.steps:,}", str(cost.gpus), memory, time)
    lines = [
        "The hours count training alone: no starts, evaluations or checkpoints. An epoch has as "
        "many images as the published dataset; --plan reads no images."
    ]
    if seeds > 1:
        lines.append(f"{seeds} seeds: {_sum(total, times=seeds)} GPU-hours.")
    missing = [(row, column, cost.why) for row, column, _, cost in costs if cost.hours is None]
    lines += _reasons(missing)
    return Group(table, each, Text("\n".join(lines)))


def _table(title: str, names: Sequence[str]) -> Table:
    # No frame, so that names of recipes fit into 80 columns.
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for name in names:
        is_text = name in ("recipe", "model")
        table.add_column(
            name,
            justify="left" if is_text else "right",
            no_wrap=name != "model",
            overflow="fold",
        )
    return table


def _reasons(missing: Sequence[tuple[str, str, str]]) -> list[str]:
    """Returns lines that group trainings by their reasons, from (row, column, reason) of each."""
    columns: dict[tuple[str, str], list[str]] = {}
    for row, column, why in missing:
        columns.setdefault((row, why), []).append(column)
    rows: dict[tuple[str, str], list[str]] = {}
    for (row, why), of_row in columns.items():
        rows.setdefault((", ".join(of_row), why), []).append(row)
    return [f"Not planned: {on} for {'; '.join(of)} ({why})." for (on, why), of in rows.items()]


def _time(hours: Between) -> str:
    days = hours.high >= 24
    return f"{figures(hours.scaled(1 / 24))} days" if days else f"{figures(hours)} h"


def _hours(cost: Cost | None) -> str:
    if cost is None:
        return ""
    return "-" if cost.hours is None else figures(cost.hours)


def _sum(costs: Iterable[Cost | None], *, times: int = 1) -> str:
    hours = [cost.hours for cost in costs if cost and cost.hours is not None]
    if not hours:
        return "-"
    # The sum is no more certain than each: what makes one training slower makes all slower.
    low, high = map(sum, zip(*hours, strict=True))
    return figures(Between(low, high).scaled(times))

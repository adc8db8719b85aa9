"""`python -m fd_large recipes`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fd_large.cli.arguments import parse
from fd_large.cli.output import tables
from fd_large.recipes import registry

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the runs of record: models, what they need, how long they take, what to expect."""


def main(arguments: list[str]) -> int:
    """Prints the table."""
    parse(Recipes, arguments, command="recipes")
    tables().print(recipes_table())
    return 0


def recipes_table() -> Table:
    """Returns the table of all runs of record, a block of lines each."""
    from rich.table import Table
    from rich.text import Text

    table = Table(show_lines=True, title="Runs of record (--recipe NAME)", title_justify="left")
    table.add_column("Recipe, teacher -> student", no_wrap=True)
    table.add_column("What it needs, how long it takes, what to expect", ratio=1)
    for name in registry.RECIPES:
        run, facts = registry.get(name), registry.facts(name)
        models = "".join(f"\n{model.model}" for model in run.frozen_models.values())
        models += (
            f"\n-> {run.student.model}" if models else f"\n{run.task.name}: {run.student.model}"
        )
        said = f"needs:  {facts.hardware}\ntakes:  {facts.duration}\nexpect: {facts.result}"
        table.add_row(Text(name, style="bold").append(models, style="not bold"), Text(said))
    return table

"""The command `fd-large recipes [NAME]`, which lists the recipes or shows one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from tyro.conf import Positional, arg

from fd_large.cli.arguments import parse
from fd_large.cli.output import tables
from fd_large.recipes import registry

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Recipes:
    """List the recipes: models, hardware, duration and expected results.

    With NAME, the command prints the reasons for that recipe's values and all its fields, in the
    form of a run file (--config FILE).
    """

    # Name of the recipe to show. Without it, all recipes are listed.
    name: Annotated[str, Positional, arg(metavar="[NAME]")] = ""


def main(arguments: list[str]) -> int:
    """Prints the table of all recipes, or the recipe that NAME selects."""
    options = parse(Recipes, arguments, command="recipes")
    if options.name:
        print(run_file(options.name))
    else:
        tables().print(recipes_table())
    return 0


def run_file(name: str) -> str:
    """Returns the recipe `name` as the text of a run file for --config.

    The text has the recipe's docstring in comments, and then its fields in YAML.

    Raises: ConfigError: if the recipe does not exist.
    """
    run = registry.get(name, where="recipes")
    lines = (inspect.getdoc(registry.RECIPES[name]) or "").splitlines()
    comments = "\n".join(f"# {line}".rstrip() for line in lines)
    fields = yaml.dump(_set(run.to_dict()), Dumper=_Dumper, sort_keys=False, width=100)
    return f"{comments}\n{fields}".rstrip()


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that writes a list on one line."""


_Dumper.add_representer(
    list, lambda dumper, items: dumper.represent_sequence("tag:yaml.org,2002:seq", items, True)
)


def _set(tree: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of the nested dicts `tree` without the values None and {}.

    A dict that becomes empty by this is left out, too.
    """
    values = {k: _set(v) if isinstance(v, dict) else v for k, v in tree.items()}
    return {name: value for name, value in values.items() if value not in (None, {})}


def recipes_table() -> Table:
    """Returns a table of all recipes, with a row of several lines for each."""
    from rich.table import Table
    from rich.text import Text

    title = "Runs of record (--recipe NAME); GPU-hours are planned on A100s"
    table = Table(show_lines=True, title=title, title_justify="left")
    table.add_column("Recipe, teacher -> student", no_wrap=True)
    table.add_column("What it needs, how long it takes, what to expect", ratio=1)
    for name in registry.RECIPES:
        run, facts = registry.get(name), registry.facts(name)
        models = "".join(f"\n{model.model}" for model in run.frozen_models.values())
        models += (
            f"\n-> {run.student.model}" if models else f"\n{run.task.name}: {run.student.model}"
        )
        takes = "; ".join(fact for fact in (facts.duration, facts.memory) if fact)
        description = f"needs:  {facts.hardware}\ntakes:  {takes}\nexpect: {facts.result}"
        table.add_row(Text(name, style="bold").append(models, style="not bold"), Text(description))
    return table

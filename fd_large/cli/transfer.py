"""The command `fd-large transfer RUN ...`, which makes the paper's Table 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from tyro.conf import Positional, arg

from fd_large.cli.arguments import AllowsCode, parse_with_recipe
from fd_large.cli.evaluate import measured
from fd_large.cli.output import tables
from fd_large.cli.paths import require_paths
from fd_large.cli.transfer_plan import cost_of, report
from fd_large.errors import ConfigError, check_all
from fd_large.evaluation.trainings import refuse_other_task
from fd_large.evaluation.transfer import table
from fd_large.evaluation.transfer.cells import Changes
from fd_large.evaluation.transfer.columns import COLUMNS
from fd_large.files import check_out
from fd_large.plan.rates import rates_of
from fd_large.recipes import registry
from fd_large.recipes.architectures import resolve
from fd_large.recipes.fields import at_least

# The words of a message before the names that are nearest to a flag's.
_UNKNOWN = "unknown flag; nearest: "
# Fields that the command itself sets.
_SET_HERE = {
    "data.root": "Name datasets by --imagenet, --ade20k and the like",
    "eval.root": "The datasets bring their own test images",
    "runtime.run_dir": "Set --out, in which each training has a folder",
}


@dataclass(frozen=True, kw_only=True)
class Transfer(table.TransferFlags, AllowsCode):
    """Train students, teachers and random weights on other tasks: the paper's Table 1.

    python -m fd_large transfer RUN [RUN ...] --imagenet DIR --ade20k DIR --coco DIR --nyuv2 DIR

    Each cell of the table is a separate training, and the same command resumes unfinished cells.
    The columns are finetune and linear (both on --imagenet), ade20k, coco and nyuv2; a column is
    left out if its dataset is not given. A field of a recipe applies to all columns, or, with a
    column's name as prefix, to that column alone: --ade20k.optim.max_steps 2000,
    --finetune.recipe finetune_clip_vit_large. docs/evaluation.md explains the figures.
    """

    # Folders of the runs that distilled the students.
    runs: Annotated[tuple[str, ...], Positional, arg(metavar="RUN [RUN ...]")] = ()
    # Print the cost of the table and train nothing. If no dataset is given, the cost is that of all
    # columns. Datasets are not read; each counts as large as the dataset that names its column.
    plan: bool = False
    # Number of GPUs of each training, for --plan. If this number does not divide the global batch
    # size, the greatest common divisor of the two is used.
    gpus: int = 8
    # GPU model for --plan: h100, h200, b200, a100, a100_40 or l40s.
    gpu: str = "h100"

    def __post_init__(self) -> None:
        AllowsCode.__post_init__(self)
        table.TransferFlags.__post_init__(self)
        at_least("--gpus", self.gpus, 1, "ranks")
        rates_of(self.gpu)


@dataclass(frozen=True, kw_only=True)
class ColumnFlags:
    """Flags of one column, besides the fields of its recipe."""

    # Recipe of the column. Empty: the published recipe that fits the model.
    recipe: str = ""


def main(arguments: list[str]) -> int:
    """Trains the cells of the table of `transfer`, and writes the table; returns the exit code."""
    words, of_columns = split(arguments)
    parsed = parse_with_recipe(
        Transfer, words, command="transfer", recipe=registry.FINETUNING_RECIPE
    )
    changes = check_all(
        *(partial(changes_of, name, of_columns.get(name, []), parsed.fields) for name in COLUMNS)
    )
    return transfer(parsed.own, dict(zip(COLUMNS, changes, strict=True)))


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separates flags of a single column, such as --ade20k.optim.epochs 3, from the other flags.

    A word that is no flag stays with the flag before it.

    Returns: the other flags; and {name of a column: its flags, without the name}.
    """
    common: list[str] = []
    of_columns: dict[str, list[str]] = {}
    target = common
    for word in arguments:
        if word.startswith("--"):
            column, dot, rest = word[2:].partition(".")
            of_column = dot and column in COLUMNS
            target = of_columns.setdefault(column, []) if of_column else common
            word = f"--{rest}" if of_column else word
        target.append(word)
    return common, of_columns


def changes_of(name: str, words: Sequence[str], common: Mapping[str, Any]) -> Changes:
    """Returns the changes of a column's recipe that the flags ask for.

    Args:
        name: Name of the column.
        words: The column's flags, without the column's name.
        common: Fields that the user set for all columns; the column's own flags win.

    Raises: ConfigError: with the flags as the user typed them.
    """
    # A field may exist for one kind of model only.
    usual = [COLUMNS[name].recipe(resolve(m), "") for m in ("vit_base_patch16", "swinv2_base")]
    parsed, mistakes = [], []
    for recipe in usual:
        try:
            parsed.append(parse_with_recipe(ColumnFlags, words, command="transfer", recipe=recipe))
        except ConfigError as error:
            mistakes.append(str(error))
    if not parsed:
        lines = []
        for line in mistakes[0].splitlines():
            message, unknown, names = line.removeprefix("--").partition(_UNKNOWN)
            close = names.replace("--", f"--{name}.", names.partition(". ")[0].count("--"))
            lines.append(f"--{name}.{message}{unknown}{close}")
        raise ConfigError("\n".join(lines))
    chosen = parsed[0]
    if chosen.own.recipe:
        recipe_run = registry.get(chosen.own.recipe)
        refuse_other_task(f"--{name}.recipe", recipe_run, registry.get(usual[0]).task.name)
    fields = {**common, **chosen.fields}
    if set_here := [
        f"--{f'{name}.' if field in chosen.fields else ''}{field}: set by transfer itself; got a "
        f"value of your own, expected none. {remedy}."
        for field, remedy in _SET_HERE.items()
        if field in fields
    ]:
        raise ConfigError("\n".join(set_here))
    return Changes(chosen.own.recipe, fields)


def transfer(options: Transfer, changes: Mapping[str, Changes]) -> int:
    """Trains the missing cells and writes the table, or prints the costs with --plan.

    `changes` are those of each column's recipe, by the column's name.

    Returns: the exit code.

    Raises: FDError: for the user's mistakes.
    """
    if options.table:
        return measured(table.TRANSFER, options, changes)
    if not options.runs:
        raise ConfigError(
            "transfer: RUN is missing; got no run, expected the folder of a run. Name a run, for "
            "example runs/mine."
        )
    folders = {f"--{name}": folder for name, folder in options.datasets.items()}
    require_paths(folders | {f"run {run}": run for run in options.runs})
    check_out(options.out, where="--out", holds="folder")
    columns = table.columns_of(options, of_all=options.plan and not any(options.datasets.values()))
    if not options.plan:
        return measured(table.TRANSFER, options, changes)
    rows, cells = table.cells_of_table(options, columns, changes)
    of_seed = cells[: len(rows) * len(columns)]
    costs = [
        (cell, cost_of(cell.recorded.run, cell.column.images, gpus=options.gpus, gpu=options.gpu))
        for cell in of_seed
    ]
    tables().print(
        report(
            [(c.row.model.label, c.column.name, c.recorded.run, cost) for c, cost in costs],
            seeds=options.seeds,
            gpu=options.gpu,
        )
    )
    from fd_large.ranks import distributed

    return distributed.leave(0)

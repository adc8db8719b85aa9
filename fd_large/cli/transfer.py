"""`python -m fd_large transfer RUN --imagenet DIR --ade20k DIR ...`: the paper's Table 1.

A cell is a training of its own, in OUT/ROW/COLUMN/seed_N, a run folder that resumes: of a model (a
row: a student, its teacher, random weights) by the recipe of a column. One that is finished is not
trained again, so the same command goes on where it stopped; a folder that holds a training of
another recipe, dataset or other weights is refused. A cell that fails is named and the others go
on; the next start tries it after them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from fd_large.cli import train, transfer_cells, transfer_slurm
from fd_large.cli.arguments import AllowsCode, parse_with_recipe
from fd_large.cli.output import tables
from fd_large.cli.paths import require_paths
from fd_large.cli.transfer_cells import Cell, Changes, RowKind, cells_of, rows_of
from fd_large.cli.transfer_columns import COLUMNS, ColumnName
from fd_large.cli.transfer_plan import cost_of, report
from fd_large.errors import ConfigError, Exit, FDError, check_all, first_line
from fd_large.evaluation import recorded_runs
from fd_large.evaluation.trainings import refuse_other_task
from fd_large.files import check_out, out_folder, write_json
from fd_large.plan.rates import rates_of
from fd_large.recipes import registry
from fd_large.recipes.architectures import resolve
from fd_large.recipes.fields import at_least, require
from fd_large.recipes.file_names import SUMMARY
from fd_large.report.transfer import DONE, FAILED, RECORD, read_cell, write_table

log = logging.getLogger(__name__)

# What comes before the names that are nearest to a flag's.
_UNKNOWN = "unknown flag; nearest: "
# Fields that the command itself sets.
_SET_HERE = {
    "data.root": "Name datasets by --imagenet, --ade20k and the like",
    "eval.root": "Tests are those of the datasets",
    "runtime.run_dir": "Set --out, in which each training has a folder",
}


@dataclass(frozen=True, kw_only=True)
class Transfer(AllowsCode):
    """Carry students, their teachers and random weights on: the paper's Table 1.

    python -m fd_large transfer RUN [RUN ...] --imagenet DIR --ade20k DIR --coco DIR --nyuv2 DIR

    Each cell of the table is a training of its own that resumes: the same command goes on where it
    stopped. Columns: finetune and linear (both on --imagenet), ade20k, coco, nyuv2; those without a
    dataset are left out. Fields of a recipe follow as in training and count for all columns; with
    the name of a column before them for that one alone: --ade20k.optim.max_steps 2000,
    --finetune.recipe finetune_clip_vit_large. docs/evaluation.md explains the figures.
    """

    # Folders of the runs that distilled the students.
    runs: Annotated[tuple[str, ...], Positional, arg(metavar="RUN [RUN ...]")] = ()
    # ImageNet, or any folder with train/ and val/ that hold a folder for each class.
    imagenet: str = ""
    # ADE20K, or any dataset that segmentation takes (docs/segmentation.md).
    ade20k: str = ""
    # COCO, or any dataset that detection takes (docs/detection.md).
    coco: str = ""
    # NYUv2, or any dataset that depth takes (docs/depth.md).
    nyuv2: str = ""
    # Columns that are trained; empty: all whose dataset is named.
    only: tuple[ColumnName, ...] = ()
    # Rows of each run: its student, its teacher, its student's architecture with random weights.
    rows: tuple[RowKind, ...] = ("student", "teacher", "scratch")
    # Number of repetitions of each cell, with runtime.seed and the seeds after it.
    seeds: int = 1
    # Folder of the table and of all trainings.
    out: str = "transfer"
    # DeepSpeed's JSON of the trainings, a name or a path.
    deepspeed_config: str = "zero1"
    # Make the table of what stands in --out by now, and train nothing.
    table: bool = False
    # Submit every training as a job of Slurm, and a last one that makes the table.
    slurm: bool = False
    # Options of sbatch for these jobs, without dashes: nodes=2 partition=gpu time=12:00:00. They
    # win over those of slurm/transfer.sh.
    sbatch: tuple[str, ...] = ()
    # Say what the table costs, and train nothing; without a dataset, of all columns. Datasets are
    # not read: they are taken to have the images of those that the columns are named after.
    plan: bool = False
    # GPUs of each training at most, for --plan; as many are taken as divide its images of a step.
    gpus: int = 8
    # Card, for --plan: h100, h200, b200, a100, a100_40 or l40s.
    gpu: str = "h100"

    def __post_init__(self) -> None:
        AllowsCode.__post_init__(self)
        at_least("--seeds", self.seeds, 1, "repetitions")
        require(bool(self.rows), "--rows: no row", "none", "at least one")
        at_least("--gpus", self.gpus, 1, "ranks")
        rates_of(self.gpu)
        transfer_slurm.check_options(self.sbatch)
        require(
            self.slurm or not self.sbatch, "--sbatch: no job is submitted", self.sbatch, "--slurm"
        )


@dataclass(frozen=True, kw_only=True)
class ColumnFlags:
    """Flags of one column, besides the fields of its recipe."""

    # Recipe of the column; empty: the one that fits the model.
    recipe: str = ""


def main(arguments: list[str]) -> int:
    """Runs the command."""
    words, of_columns = split(arguments)
    given = parse_with_recipe(
        Transfer, words, command="transfer", recipe=registry.FINETUNING_RECIPE
    )
    found = check_all(
        *(partial(changes_of, name, of_columns.get(name, []), given.fields) for name in COLUMNS)
    )
    return transfer(given.own, dict(zip(COLUMNS, found, strict=True)))


def split(arguments: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Separates flags of single columns, --ade20k.optim.epochs 3, from the others.

    Returns: the others; those of each column, without its name.
    """
    common: list[str] = []
    of_columns: dict[str, list[str]] = {}
    target = common
    for word in arguments:
        if word.startswith("--"):
            column, dot, rest = word[2:].partition(".")
            own = dot and column in COLUMNS
            target = of_columns.setdefault(column, []) if own else common
            word = f"--{rest}" if own else word
        target.append(word)
    return common, of_columns


def changes_of(name: str, words: Sequence[str], common: Mapping[str, Any]) -> Changes:
    """Reads the flags of a column.

    Args:
        name: Its name.
        words: The flags, without its name.
        common: Fields that are given for all columns.

    Raises: ConfigError: naming the flags as they were typed.
    """
    # A field may be of one kind of models alone.
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
            said, unknown, names = line.removeprefix("--").partition(_UNKNOWN)
            close = names.replace("--", f"--{name}.", names.partition(". ")[0].count("--"))
            lines.append(f"--{name}.{said}{unknown}{close}")
        raise ConfigError("\n".join(lines))
    given = parsed[0]
    if given.own.recipe:
        own = registry.get(given.own.recipe)
        refuse_other_task(f"--{name}.recipe", own, registry.get(usual[0]).task.name)
    fields = {**common, **given.fields}
    if set_here := [
        f"--{one}: set by transfer itself; got a value of your own, expected none. {remedy}."
        for one, remedy in _SET_HERE.items()
        if one in fields
    ]:
        raise ConfigError("\n".join(set_here))
    return Changes(given.own.recipe, fields)


def transfer(own: Transfer, changes: Mapping[str, Changes]) -> int:
    """Trains what is missing of the table, and makes it; returns the exit code.

    Args:
        own: The command's own arguments.
        changes: What is changed of the recipes of each column.

    Raises: FDError: for the user's mistakes.
    """
    if own.table:
        return show(Path(own.out))
    if not own.runs:
        raise ConfigError(
            "transfer: RUN is missing; got none, expected the folder of a run. Name one, for "
            "example runs/mine."
        )
    datasets = {column.data: getattr(own, column.data) for column in COLUMNS.values()}
    folders = {f"--{name}": folder for name, folder in datasets.items()}
    require_paths(folders | {f"run {run}": run for run in own.runs})
    check_out(own.out, where="--out", holds="folder")
    plans_all = own.plan and not any(datasets.values())
    columns = [
        column
        for column in COLUMNS.values()
        if (datasets[column.data] or plans_all) and (not own.only or column.name in own.only)
    ]
    if not columns:
        raise ConfigError(
            "transfer: no column to train; got no dataset for "
            f"{', '.join(own.only) or 'any'}, expected at least one of "
            f"{', '.join(f'--{name}' for name in datasets)}. Name one."
        )
    from fd_large.ranks import distributed, meeting
    from fd_large.runtime import logs

    # Jobs inherit it, and must not meet at the port of this process.
    environ = dict(os.environ)
    logs.start(distributed.start().rank)
    rows = meeting.meet(lambda: rows_of(own.runs, own.rows))
    cells = [
        cell
        for seed in range(own.seeds)
        for column in columns
        for cell in cells_of(
            rows,
            column,
            changes[column.name],
            root=datasets[column.data],
            out=own.out,
            seed=seed,
        )
    ]
    if own.plan:
        show_plan(own, cells[: len(rows) * len(columns)])
        return distributed.leave(Exit.DONE)
    refused = meeting.meet(lambda: transfer_cells.untrainable(cells[: len(rows) * len(columns)]))
    cells = [c for c in cells if (c.row.model.label, c.column.name) not in refused]
    why = transfer_cells.named(refused)
    if not cells:
        raise ConfigError(
            f"transfer: nothing can be trained; got {why}, expected a cell that can. "
            "Set --rows or --only to others, or name another run."
        )
    if refused and distributed.is_main():
        log.warning("transfer: cannot be trained, and are left out: %s", why)
    first = {cell.column.name: cell for cell in reversed(cells)}
    meeting.meet(lambda: check_all(*map(transfer_cells.opens, reversed(first.values()))))
    states = distributed.broadcast_object(
        distributed.together(
            lambda: transfer_cells.states_of(own.out, cells) if distributed.is_main() else []
        )
    )
    out, done = out_folder(own.out), states.count(DONE)
    if distributed.is_main():
        write_json(out / SUMMARY, transfer_cells.described(out, rows, cells))
        tables().print(f"transfer: {len(cells)} trainings, {done} of them done before")
    # What failed before comes last: it may fail again, and end all ranks.
    ordered = sorted(zip(states, cells, strict=True), key=lambda pair: pair[0] == FAILED)
    missing = [cell for state, cell in ordered if state != DONE]
    if own.slurm:
        if distributed.is_main():
            submit(own, missing, environ)
        return distributed.leave(Exit.DONE)
    code = train_all(missing, own.deepspeed_config)
    if distributed.is_main():
        show(out)
    return distributed.leave(code)


def train_all(cells: Sequence[Cell], deepspeed_config: str) -> int:
    """Trains cells one after the other; returns the exit code.

    Args:
        cells: What is not finished.
        deepspeed_config: DeepSpeed's JSON, a name or a path.

    Returns: 0 if all are finished, 75 where the same command is to go on, else that of what failed.
    Raises: FDError: where several ranks train and one of them fails, which ends all of them.
    """
    from fd_large.ranks import distributed

    worst: int = Exit.DONE
    for number, cell in enumerate(cells, 1):
        log.info("transfer: %s (%d of %d)", cell.folder, number, len(cells))
        transfer_cells.record(cell)
        try:
            code, _ = recorded_runs.train(cell.run, deepspeed_config, train.train_run)
            reason = read_cell(cell.folder)[1] or f"exit code {code}"
        except Exception as error:
            code, reason = getattr(error, "exit_code", Exit.LOST), first_line(error)
            if distributed.world_size() > 1:
                if distributed.is_main():
                    transfer_cells.write_record(cell, failure=reason)
                raise
            if not isinstance(error, FDError):
                log.exception("%s: FAILED", cell.folder)
        if code == Exit.AGAIN:
            return code
        if code:
            transfer_cells.record(cell, failure=reason)
            worst = max(worst, code)
            log.error("%s: FAILED: %s; the others go on", cell.folder, reason)
    return worst


def submit(own: Transfer, cells: Sequence[Cell], environ: Mapping[str, str]) -> None:
    """Submits the trainings of cells, and the job that makes the table; prints what was submitted.

    Args:
        own: The command's own arguments.
        cells: What is not finished; of these, what waits or runs as a job stays as it is.
        environ: The environment that jobs inherit.
    """
    jobs, console = [], tables()
    for cell in cells:
        job = recorded_runs.read_record(RECORD, cell.run, cell.inputs, "a training").get("job")
        if job and transfer_slurm.is_queued(job):
            console.print(f"{cell.folder}: job {job}, submitted before", soft_wrap=True)
        else:
            transfer_cells.write_record(cell)
            job = transfer_slurm.submit_training(
                cell.run,
                deepspeed_config=own.deepspeed_config,
                options=own.sbatch,
                environ=environ,
            )
            transfer_cells.write_record(cell, job=job)
            console.print(f"{cell.folder}: job {job}", soft_wrap=True)
        jobs.append(job)
    if not jobs:
        show(Path(own.out))
        return
    last = transfer_slurm.submit_table(own.out, jobs, options=own.sbatch, environ=environ)
    console.print(f"{own.out}: job {last} makes the table once they have ended", soft_wrap=True)


def show(folder: Path) -> int:
    """Makes the table of what stands in a folder, and prints it; returns the exit code.

    Raises: ConfigError: if it is not the folder of a table.
    """
    _, shown, files = write_table(folder)
    console = tables()
    for table in shown:
        console.print(table)
    console.print(", ".join(map(str, files)), soft_wrap=True)
    return Exit.DONE


def show_plan(own: Transfer, cells: Sequence[Cell]) -> None:
    """Prints what the trainings of one seed cost, and all of them."""
    costs = [
        (cell.row.model.label, cell.column.name, cell.run, cost)
        for cell in cells
        for cost in [cost_of(cell.run, cell.column.images, gpus=own.gpus, gpu=own.gpu)]
    ]
    columns = dict.fromkeys(cell.column.name for cell in cells)
    tables().print(report(costs, columns=columns, seeds=own.seeds, gpu=own.gpu))

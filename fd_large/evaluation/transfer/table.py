"""Trains the missing cells of the table of `transfer`, and writes the table.

A row is a model (a student, its teacher, or random weights), and a cell is the training of a row's
model by a column's recipe, in the run folder OUT/ROW/COLUMN/seed_N. Unfinished cells are resumed
and finished cells are not trained again, so that the same command continues where it stopped. A
folder with a training of another recipe, dataset or weights is refused. After a failed cell, the
other cells are still trained; the next start tries the failed cell last.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from fd_large.errors import ConfigError, Exit, FDError, check_all, first_line
from fd_large.evaluation import recorded_runs
from fd_large.evaluation.protocol import Protocol, Request, Result
from fd_large.evaluation.sweep import SweepFlags, check_fields, sweep
from fd_large.evaluation.transfer import cells as cells_
from fd_large.evaluation.transfer import slurm
from fd_large.evaluation.transfer.cells import Cell, Changes, Row
from fd_large.evaluation.transfer.columns import COLUMNS, Column
from fd_large.evaluation.transfer.intervals import of_runs, single_class
from fd_large.files import out_folder, write_json
from fd_large.recipes.fields import at_least, require
from fd_large.recipes.file_names import SUMMARY
from fd_large.report.transfer import DONE, FAILED, read_cell, write_table
from fd_large.runtime import terminal

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TransferFlags(SweepFlags):
    """Flags of the table, its rows, its columns and its trainings."""

    # Folder of ImageNet, or any folder with train/ and val/ that hold a folder for each class.
    imagenet: str = ""
    # Folder of ADE20K, or any dataset that segmentation takes (docs/segmentation.md).
    ade20k: str = ""
    # Folder of COCO, or any dataset that detection takes (docs/detection.md).
    coco: str = ""
    # Folder of NYUv2, or any dataset that depth takes (docs/depth.md).
    nyuv2: str = ""
    # Columns that are trained: finetune, linear, ade20k, coco or nyuv2. Empty: all columns whose
    # dataset is given.
    only: tuple[str, ...] = ()
    # Rows of the table for each run. student: the run's student. teacher: the run's teachers.
    # scratch: the student's architecture with random weights. The name of a teacher, if there are
    # several: that teacher alone.
    rows: tuple[str, ...] = ("student", "teacher", "scratch")
    # Number of repetitions of each cell. Their seeds are runtime.seed and the numbers after it.
    seeds: int = 1
    # Folder for the table and for the run folders of all trainings.
    out: str = "transfer"
    # DeepSpeed's JSON of the trainings, a name or a path.
    deepspeed_config: str = "zero1"
    # Make the table from the results that are in --out so far, and train nothing.
    table: bool = False
    # Submit each training as a Slurm job, and a last job that makes the table.
    slurm: bool = False
    # Options of sbatch for the jobs of --slurm, without dashes: nodes=2 partition=gpu
    # time=12:00:00. They override the options in slurm/transfer.sh.
    sbatch: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            not (self.sweep and self.slurm),
            "--sweep: its trials cannot be Slurm jobs",
            "--sweep with --slurm",
            "one of the two",
            "Leave one of them out",
        )
        at_least("--seeds", self.seeds, 1, "repetitions")
        require(bool(self.rows), "--rows: no row", "none", "at least one")
        for name in self.only:
            require(name in COLUMNS, "--only: no such column", name, ", ".join(COLUMNS))
        slurm.check_options(self.sbatch)
        require(
            self.slurm or not self.sbatch,
            "--sbatch: no job is submitted without --slurm",
            self.sbatch,
            "--slurm beside it",
            "Add --slurm, or leave out --sbatch",
        )

    @property
    def datasets(self) -> dict[str, str]:
        """The root of each dataset by the name of its flag; "" if the flag is not given."""
        return {column.data: getattr(self, column.data) for column in COLUMNS.values()}


def columns_of(flags: TransferFlags, *, of_all: bool = False) -> list[Column]:
    """Returns the columns whose dataset is given, in the order of the table.

    With `--only`, only the columns that this flag names are returned.

    Args:
        flags: Flags of the command.
        of_all: Whether to include columns whose dataset is not given.

    Raises: ConfigError: if there is no column.
    """
    columns = [
        column
        for column in COLUMNS.values()
        if (of_all or flags.datasets[column.data]) and (not flags.only or column.name in flags.only)
    ]
    if not columns:
        raise ConfigError(
            "transfer: no column to train; got no dataset for "
            f"{', '.join(flags.only) or 'any'}, expected at least one of "
            f"{', '.join(f'--{name}' for name in flags.datasets)}. Set one of these flags."
        )
    return columns


def cells_of_table(
    flags: Any, columns: Sequence[Column], changes: Mapping[str, Changes]
) -> tuple[list[Row], list[Cell]]:
    """Returns the rows, and all cells seed by seed.

    Every rank has to call this function.

    Args:
        flags: Flags of the command.
        columns: The columns.
        changes: The user's changes to the recipes of each column, by the column's name.

    Raises: FDError: if a model is missing, or a recipe does not allow a change.
    """
    from fd_large.ranks import distributed, meeting
    from fd_large.runtime import logs

    logs.start(distributed.start().rank)
    rows = meeting.meet(lambda: cells_.rows_of(flags.runs, flags.rows))
    of_seeds = (cells_.cells_of(rows, columns, changes, flags, n) for n in range(flags.seeds))
    return rows, [*chain.from_iterable(of_seeds)]


def _measure(request: Request) -> Result:
    """Trains the missing cells, or submits them as jobs, and writes the table."""
    flags = request.flags
    if flags.table:
        return _made(Path(flags.out))
    # Copied for the jobs before this process adds its own port, at which they must not meet.
    environ = dict(os.environ)
    columns = columns_of(flags)
    from fd_large.ranks import distributed, meeting
    from fd_large.tasks.jobs import job_of

    rows, cells = cells_of_table(flags, columns, request.changes)
    refused = meeting.meet(lambda: cells_.untrainable(cells[: len(rows) * len(columns)]))
    cells = [c for c in cells if (c.row.model.label, c.column.name) not in refused]
    why = cells_.named(refused)
    if not cells:
        raise ConfigError(
            f"transfer: nothing can be trained; got {why}, expected at least one cell that can be "
            "trained. Set --rows or --only to others, or name another run."
        )
    if refused and distributed.is_main():
        log.warning("transfer: these cells are left out, because they cannot be trained: %s", why)
    first = {cell.column.name: cell for cell in reversed(cells)}
    # Mistakes in datasets are reported before hours of training.
    jobs = [job_of(cell.recorded.run) for cell in reversed(first.values())]
    meeting.meet(lambda: check_all(*(job.open_samples for job in jobs)))
    if flags.sweep:
        code, cells = _swept(cells, request)
        if code:
            return Result(code=code)
    states = distributed.of_main(lambda: cells_.states_of(flags.out, cells))
    out, done = out_folder(flags.out), states.count(DONE)
    if distributed.is_main():
        write_json(out / SUMMARY, cells_.described(out, rows, cells))
        terminal.console().print(f"transfer: {len(cells)} trainings, {done} of them done before")
    # Cells that failed before come last, since they may fail again and end all ranks.
    ordered = sorted(zip(states, cells, strict=True), key=lambda pair: pair[0] == FAILED)
    missing = [cell for state, cell in ordered if state != DONE]
    if flags.slurm:
        if not distributed.is_main() or slurm.submit(missing, flags, environ):
            return Result()
        return _made(out)
    code = train_all(missing, flags.deepspeed_config, request.train)
    return _made(out)._replace(code=code) if distributed.is_main() else Result(code=code)


def _swept(cells: Sequence[Cell], request: Request) -> tuple[int, list[Cell]]:
    """Runs the sweep in each column that can be swept, over the recipes of all rows.

    Args:
        cells: All cells of the table.
        request: The user's request.

    Returns: the exit code; and all cells, or none if the code is not 0. A cell of a swept column
        has the best setting for its row; other cells are unchanged.

    Raises: ConfigError: if no column of the cells can be swept.
    """
    flags, chosen = request.flags, {id(cell): cell for cell in cells}
    columns = {cell.column.name: cell.column for cell in cells if cell.column.held_out}
    if not columns:
        raise ConfigError(
            "--sweep: no column that can be swept; got "
            f"{', '.join(dict.fromkeys(cell.column.name for cell in cells))}, expected one of "
            f"{', '.join(name for name, entry in COLUMNS.items() if entry.held_out)}. Leave out "
            "--sweep."
        )
    config = flags.deepspeed_config
    train = partial(recorded_runs.train, deepspeed_config=config, train_run=request.train)
    for name in columns:
        check_fields(request.changes[name].fields)
    for column in columns.values():
        changes = request.changes[column.name]
        of_column = [cell for cell in cells if cell.column is column]
        firsts = of_column[: len(of_column) // flags.seeds]
        rows = [cell.row for cell in firsts]
        tried = [cells_.tried_for(cell, rows, changes, flags) for cell in firsts]
        code, sweeps = sweep(
            [row.model for row in rows],
            tried,
            flags,
            train,
            changes.fields,
            column.metric,
            # Trials of fine-tuning keep the folder of the time when only this column was swept.
            column=column.name if column.recipes else "",
        )
        if code:
            return code, []
        # The rows come in the same order for each seed.
        for place, cell in enumerate(of_column):
            of_row = place % len(rows)
            chosen[id(cell)] = cells_.swept(cell, sweeps[of_row], tried[of_row], changes)
    return 0, list(chosen.values())


def _made(folder: Path) -> Result:
    """Writes the table from the runs below `folder`; returns the protocol's result with it."""
    _, tables, files = write_table(folder, of_runs, single_class)
    return Result(tables, files)


def train_all(cells: Sequence[Cell], deepspeed_config: str, train_run: Callable[..., int]) -> int:
    """Trains cells one after another.

    Args:
        cells: Unfinished cells.
        deepspeed_config: DeepSpeed's JSON, a name or a path.
        train_run: Function that trains a run, (run, deepspeed_config=...) -> exit code.

    Returns: the exit code: 0 if all cells are finished, 75 if a signal stopped a cell and the same
        command will resume it, or else the largest code of the failed cells.

    Raises: Exception: the error of a training on several ranks, which ends all ranks.
    """
    from fd_large.ranks import distributed

    worst: int = Exit.DONE
    for number, cell in enumerate(cells, 1):
        recorded, folder = cell.recorded, cell.recorded.folder
        log.info("transfer: %s (%d of %d)", folder, number, len(cells))
        distributed.of_main(recorded.write)
        try:
            code, _ = recorded_runs.train(recorded.run, deepspeed_config, train_run)
            reason = read_cell(folder)[1] or f"exit code {code}"
        except Exception as error:
            code, reason = getattr(error, "exit_code", Exit.LOST), first_line(error)
            if distributed.world_size() > 1:
                if distributed.is_main():
                    recorded.write(failure=reason)
                raise
            if not isinstance(error, FDError):
                log.exception("%s: FAILED", folder)
        if code == Exit.AGAIN:
            return code
        if code:
            distributed.of_main(partial(recorded.write, failure=reason))
            worst = max(worst, code)
            log.error("%s: FAILED: %s; the other trainings go on", folder, reason)
    return worst


TRANSFER = Protocol(
    name="transfer",
    title="Transfer",
    command="transfer",
    measure=_measure,
    flags=TransferFlags,
    fields=None,
)

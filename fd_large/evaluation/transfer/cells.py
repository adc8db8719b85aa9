"""Cells of the table of `transfer`, each of which is the training of a model on a task.

A row of the table is a model, and a column is a task. The training of each cell has its own folder
with a record (`recorded_runs`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fd_large.errors import ConfigError, check_all, first_line
from fd_large.evaluation.recorded_runs import RecordedRun, decides, unlike
from fd_large.evaluation.sweep import Sweep
from fd_large.evaluation.trainings import started_from
from fd_large.evaluation.transfer.columns import COLUMNS, Column
from fd_large.files import read_json
from fd_large.recipes import registry
from fd_large.recipes.run import Run, difference
from fd_large.recipes.stored import (
    read_recipe,
    recipe_file,
    run_of_checkpoint,
    with_stored_ends,
)
from fd_large.report.transfer import RECORD, read_cell
from fd_large.tasks.registry import kind_of

if TYPE_CHECKING:
    from fd_large.engine.find_model import NamedModel

RowKind = Literal["student", "teacher", "scratch"]
_KINDS: dict[str, RowKind] = {"student": "student", "scratch": "scratch"}
# Fields of a distillation that may differ from the paper's without making it another student.
_ANY_TEACHER_FILE = {f"teacher.{name}" for name in ("source", "statistics", "allow", "placement")}


# Fields that decide the cost of a training; all rows take the first row's values.
_BUDGET = (
    *("optim.epochs", "optim.max_steps", "optim.warmup_epochs", "optim.ema_decay"),
    "batch.global_batch_size",
)


class Changes(NamedTuple):
    """Changes that the user makes to the recipes of a column.

    Attributes:
        recipe: Name of the recipe, or "" for the published recipe that fits the model.
        fields: The changed fields, {full name: new value}.
    """

    recipe: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """Row of the table, which is a model.

    Attributes:
        kind: Role of the model in its run: "student", "teacher", or "scratch" for the student's
            architecture with random weights.
        model: The model and the source of its weights.
        run: The recipe of the distillation to which the model belongs.
        weights: Digest of the model's weights.
        others: For a student, the names of the rows with which it is compared, by their kind.
    """

    kind: RowKind
    model: NamedModel
    run: Run
    weights: str
    others: dict[str, list[str]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the row's folder."""
        from fd_large.engine.find_model import slug

        return slug(self.model.label)


class Cell(NamedTuple):
    """Cell of the table, which is the training of a row's model on a column's task.

    Attributes:
        row: The model.
        column: The task.
        recorded: The run of the cell. The record of the run also has the user's changes that may
            affect a score, {field: (the recipe's value, the user's value)}.
    """

    row: Row
    column: Column
    recorded: RecordedRun


def rows_of(runs: Sequence[str], names: Sequence[str]) -> list[Row]:
    """Returns the rows of the table; a model that several runs share has one row.

    Args:
        runs: Folders of the runs that distilled the students.
        names: The rows of each run, as `--rows`: "student", "scratch", "teacher" for all teachers
            of the run, or the name of one of several teachers.

    Raises: FDError: if a model is missing.
    """
    from fd_large.engine.find_model import find_model, with_own_labels
    from fd_large.engine.node_consistency import weights_digest
    from fd_large.tasks.jobs import job_of

    rows_by_key: dict[tuple[Any, ...], Row] = {}
    students: list[tuple[Row | None, list[Row]]] = []
    for run in runs:
        folder = run_of_checkpoint(run)
        recipe_file(folder, where="transfer")
        recipe = read_recipe(folder, where="transfer")
        of_run: dict[str, Row] = {}
        for part in _parts_of(recipe, names):
            kind = _KINDS.get(part, "teacher")
            model = find_model(run if kind == "student" else f"{run}#{part}", job_of)
            section = model.section
            digest = weights_digest(section.source, model.weights)
            row = Row(kind, model, recipe, digest)
            # The recipes of students and of random weights follow from their run.
            name = "" if kind == "teacher" else row.run.name
            key = (kind, section.model, section.architecture, section.source, digest, name)
            of_run[part] = rows_by_key.setdefault(key, row)
        students.append((of_run.pop("student", None), [*of_run.values()]))
    rows = list(rows_by_key.values())
    labelled = with_own_labels([row.model for row in rows])
    named = {id(row): replace(row, model=m) for row, m in zip(rows, labelled, strict=True)}
    for student, others in students:
        if student is not None:
            for other in others:
                of_kind = named[id(student)].others.setdefault(other.kind, [])
                # Two of its teachers may be the same model.
                if (name := named[id(other)].name) not in of_kind:
                    of_kind.append(name)
    return list(named.values())


def _parts_of(run: Run, names: Sequence[str]) -> list[str]:
    """Returns the models of a run that are rows, as "student", "scratch" or a teacher's name.

    Args:
        run: The recipe of the run.
        names: Values of `--rows`: "student", "scratch", "teacher" for all teachers of the run, or
            the name of one of several teachers.
    """
    teachers = [*run.teachers] or ["teacher"]
    parts = (teachers if name == "teacher" else [name] for name in names)
    return list(dict.fromkeys(chain.from_iterable(parts)))


def cells_of(
    rows: Sequence[Row],
    columns: Sequence[Column],
    changes: Mapping[str, Changes],
    flags: Any,
    seed: int,
) -> list[Cell]:
    """Returns the cells of one repetition, column by column, with a cell for each row.

    All rows take the recipe of the first row, so that all are trained alike. If the column has
    recipes for each kind of model (ViT, Swin) and a row's model is of another kind than the first
    row's, the row takes a recipe for its own kind, with the first recipe's epochs, steps, warm-up,
    average of weights and global batch size.

    Args:
        rows: The models.
        columns: The columns.
        changes: The user's changes to the recipes of each column, by the column's name.
        flags: The flags of the table.
        seed: Index of the repetition from 0, which is added to runtime.seed.

    Raises: ConfigError: with a line for each recipe that does not allow a change or a model.
    """
    each = [(row, column) for column in columns for row in rows]
    return check_all(
        *(
            partial(_cell, row, rows[0], column, changes[column.name], flags, seed)
            for row, column in each
        )
    )


def _fitting(row: Row, column: Column) -> str:
    """Returns the name of the published recipe of `column` that fits the model of `row` best."""
    # Random weights take the recipe of their run's student, so that only the weights differ.
    of_run = None if row.kind == "teacher" else row.run.name
    return column.recipe(row.model.architecture, of_run)


def _cell(row: Row, first: Row, column: Column, changes: Changes, flags: Any, seed: int) -> Cell:
    base = registry.get(changes.recipe or _fitting(first, column))
    budget: dict[str, Any] = {}
    kinds = [cell_row.model.architecture.is_hierarchical for cell_row in (row, first)]
    if not changes.recipe and kinds[0] != kinds[1] and column.is_of_one_kind:
        of_first, base = base, registry.get(_fitting(row, column))
        values = difference(base, of_first)
        budget = {name: values[name][1] for name in _BUDGET if name in values}
    fields = {**budget, **changes.fields, "data.root": flags.datasets[column.data]}
    started = _started(row.model, base, fields)
    seed += started.runtime.seed
    folder = Path(flags.out) / row.name / column.name / f"seed_{seed}"
    run = replace(started, runtime=replace(started.runtime, run_dir=str(folder), seed=seed))
    run = with_stored_ends(run, fields)
    inputs, known = {"weights": row.weights}, _changes_of(run, base, fields)
    return Cell(row, column, RecordedRun(RECORD, "a training", run, inputs, known))


def _changes_of(run: Run, base: Run, fields: Iterable[str]) -> dict[str, Any]:
    """Returns which fields of a published recipe were changed, as two entries of a record.

    The entry `changed` is {field: (the published value, the new value)}, and `unchanged` is True if
    there is none.

    Args:
        run: The recipe that is trained.
        base: The published recipe.
        fields: Names of the fields that were changed on purpose. Changes of other fields, which
            follow from the model, are not recorded.
    """
    user_fields = {*fields} - {"data.root"}
    changed = {
        name: values
        for name, values in difference(base, run).items()
        if name in user_fields and decides(name, run.task.name)
    }
    return {"unchanged": not changed, "changed": changed}


def tried_for(cell: Cell, rows: Sequence[Row], changes: Changes, flags: Any) -> list[Run]:
    """Returns the recipes that a sweep tries for a row: the row's own, then those of other rows.

    If each recipe of the column is for one kind of model (ViT, Swin), only recipes of rows of the
    same kind are tried.

    Args:
        cell: The row's cell of the first repetition.
        rows: All rows.
        changes: The user's changes to the recipes of the column.
        flags: The flags of the table.
    """
    model, column = cell.row.model, cell.column
    alike = [
        row
        for row in (cell.row, *rows)
        if row.model.architecture.is_hierarchical == model.architecture.is_hierarchical
    ]
    suited = alike if column.is_of_one_kind else [cell.row, *rows]
    names = [changes.recipe] if changes.recipe else [_fitting(row, column) for row in suited]
    fields = {**changes.fields, "data.root": flags.datasets[column.data]}
    return [_started(model, registry.get(name), fields) for name in dict.fromkeys(names)]


def swept(cell: Cell, sweep: Sweep, tried: Sequence[Run], changes: Changes) -> Cell:
    """Returns a cell with the best setting that a sweep has found for its row.

    Args:
        cell: The cell.
        sweep: The results of the sweep.
        tried: The recipes that the sweep tried for the row.
        changes: The user's changes to the recipes of the column.
    """
    run = replace(sweep.best_of(tried, changes.fields), runtime=cell.recorded.run.runtime)
    fields = (*changes.fields, "optim.base_lr", "optim.layer_decay")
    known = {**_changes_of(run, registry.get(run.name), fields), "sweep": sweep.as_json()}
    return cell._replace(recorded=cell.recorded._replace(run=run, known=known))


def _started(model: NamedModel, base: Run, fields: Mapping[str, Any]) -> Run:
    """Returns a recipe with changed fields that starts from a model's weights.

    Args:
        model: The model. If `fields` set an image size and the recipe's task classifies images,
            the model is built for this size; other tasks adapt the model to it by themselves.
        base: The recipe.
        fields: The changed fields, {full name: value}. A window size is ignored if the recipe's
            model has no windows.
    """
    from fd_large.engine.find_model import find_model
    from fd_large.tasks.jobs import job_of

    size = fields.get("data.image_size")
    if size and kind_of(base.task.name).trains_models:  # Other tasks resize positions themselves.
        model = find_model(model.source, job_of, image_size=size)
    window = "student.architecture.window_size"
    if not hasattr(base.student_architecture(), "window_size"):
        fields = {name: value for name, value in fields.items() if name != window}
    return started_from(model, base, fields)


def described(out: Path, rows: Sequence[Row], cells: Sequence[Cell]) -> dict[str, Any]:
    """Returns the content of the table's summary.json, which has no scores.

    The file also lists cells of other columns that earlier commands trained from the same weights.

    Args:
        out: Folder of the table.
        rows: The rows.
        cells: The cells of the present command.
    """
    entries: dict[tuple[str, str, int], dict[str, Any]] = {}
    recipes: dict[tuple[str, str, int], Run] = {}
    for row in rows:
        for file in sorted(out.glob(f"{row.name}/*/seed_*/{RECORD}")):
            record = read_json(file, where="--out", holds=dict)
            column, seed = file.parts[-3], record["recipe"]["runtime"]["seed"]
            if column in COLUMNS and record["weights"] == row.weights:
                entries[row.name, column, seed] = _described(record)
                recipes[row.name, column, seed] = Run.from_dict(record["recipe"])
    for cell in cells:
        run, known = cell.recorded.run, cell.recorded.known
        key = cell.row.name, cell.column.name, run.runtime.seed
        entries[key], recipes[key] = _described({"recipe": run.to_dict(), **known}), run
    firsts: dict[str, Run] = {}
    for row in rows:
        for key in (key for key in entries if key[0] == row.name):
            entries[key]["unlike_first"] = unlike(
                firsts.setdefault(key[1], recipes[key]), recipes[key]
            )
    return {
        "rows": [
            {"name": row.name, "label": row.model.label, "kind": row.kind}
            | {"source": row.model.source, "weights": row.weights}
            | _as_entries(row.others)
            for row in rows
        ],
        "columns": [
            {"name": column.name, "title": column.title}
            | {"scores": [score._asdict() for score in column.scores]}
            for column in COLUMNS.values()
        ],
        "cells": [
            {"row": row, "column": column, "seed": seed, **cell}
            for (row, column, seed), cell in entries.items()
        ],
        "published": [
            figures
            for row in rows
            for column in COLUMNS.values()
            for figures in _published(row, column, entries)
        ],
    }


def _as_entries(others: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Returns the entries of summary.json that name the rows with which a student is compared.

    Args:
        others: {kind of row: names of the rows of this kind}. A single row is stored under its
            kind, {"teacher": NAME}, and several under the plural, {"teachers": [NAME, ...]}.
    """
    single = {kind: names[0] for kind, names in others.items() if len(names) == 1}
    return single | {f"{kind}s": names for kind, names in others.items() if len(names) > 1}


def _described(record: dict[str, Any]) -> dict[str, Any]:
    """Returns the entry of a cell in summary.json.

    Args:
        record: The record in the folder of the cell's run, cell.json.
    """
    recipe = record["recipe"]
    return {
        "recipe": recipe["name"],
        "unchanged": record["unchanged"],
        "changed": record.get("changed", {}),
        "run": recipe["runtime"]["run_dir"],
        "data": recipe["data"]["root"],
    } | ({"sweep": record["sweep"]} if "sweep" in record else {})


def _published(
    row: Row, column: Column, entries: Mapping[tuple[str, str, int], dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yields the entry of summary.json with the paper's scores of a cell, if the paper has them.

    Args:
        row: The row of the cell.
        column: The column of the cell.
        entries: The entries of all cells, by the row's name, the column's name and the seed.
    """
    paper = column.published.get(row.run.name)
    if paper is None or row.kind == "scratch" or not _is_of_record(row.run):
        return
    cells = [cell for key, cell in entries.items() if key[:2] == (row.name, column.name)]
    same = all(cell["unchanged"] and cell["recipe"] == paper.recipe for cell in cells)
    figures = paper.student if row.kind == "student" else paper.teacher
    yield {
        "row": row.name,
        "column": column.name,
        "figures": {score.key: f for score, f in zip(column.scores, figures, strict=True)},
        "same_settings": row.kind == "student" and bool(cells) and same,
    }


def _is_of_record(run: Run) -> bool:
    """Whether all settings of `run` are those of the published recipe with the run's name.

    Only the file of the teacher's weights may differ.
    """
    recipe = registry.get(run.name)
    # In both directions, since a resume may change a length to a longer one.
    changed = recipe.changes_since(run.to_dict()) | run.changes_since(recipe.to_dict())
    return changed.keys() <= _ANY_TEACHER_FILE


def untrainable(cells: Iterable[Cell]) -> dict[tuple[str, str], str]:
    """Returns the cells that cannot be trained, {(row's label, column's name): the reason}.

    The model of each cell is built without weights, so that the reason appears before hours of
    other trainings. Columns of ImageNet are not checked, since a classifier fits any model.
    """
    import torch

    from fd_large.tasks.jobs import job_of

    reasons = {}
    for cell in cells:
        if cell.column.data != "imagenet":
            try:
                with torch.device("meta"):
                    job_of(cell.recorded.run).make_task()
            except ConfigError as error:
                # The remedy is left out: it is for users who set the student.
                why = first_line(error).rsplit(". ", 1)[0]
                reasons[cell.row.model.label, cell.column.name] = why
    return reasons


def named(refused: Mapping[tuple[str, str], str]) -> str:
    """Returns a text that lists cells which cannot be trained, with the reasons.

    Args:
        refused: {(row's label, column's name): the reason}.
    """
    columns: dict[tuple[str, str], list[str]] = {}
    for (row, column), why in refused.items():
        columns.setdefault((row, why), []).append(column)
    return "; ".join(f"{row} on {', '.join(on)} ({why})" for (row, why), on in columns.items())


def states_of(out: str, cells: Sequence[Cell]) -> list[str]:
    """Returns the state of the run of each cell: `DONE`, `FAILED`, or "" for an unfinished run.

    Args:
        out: Folder of the table.
        cells: The cells.

    Raises:
        ConfigError: If the folder of a cell holds a different run, or if the run of a cell is in a
            folder that an earlier command named by another label of the same model.
    """
    others = {}
    for cell in cells:
        if not cell.recorded.read():
            others.update(dict.fromkeys(_elsewhere(Path(out), cell), cell.row.name))
    rows = {cell.row.name for cell in cells}
    if mistakes := [
        f"{folder}: holds trainings of this start under another label, as which runs are named "
        f"together decides a label; got {name}, expected {folder.name}. Rename the folder to "
        f"{name}, or set --out to another one."
        for folder, name in others.items()
        if folder.name not in rows
    ]:
        raise ConfigError("\n".join(mistakes))
    return [read_cell(cell.recorded.folder)[0] for cell in cells]


def _elsewhere(out: Path, cell: Cell) -> Iterator[Path]:
    """Yields the folders of rows that contain the training of a cell, possibly by another label.

    Args:
        out: Folder of the table, which has a folder for each row.
        cell: The cell.
    """
    run, seed = cell.recorded.run, cell.recorded.folder.name
    for file in sorted(out.glob(f"*/{cell.column.name}/{seed}/{RECORD}")):
        there = replace(run, runtime=replace(run.runtime, run_dir=str(file.parent)))
        with suppress(ConfigError):
            cell.recorded._replace(run=there).read()
            yield file.parents[2]

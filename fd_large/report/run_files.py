"""Reads the folder of a run for a report, of finished, running and killed runs alike."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any

import numpy

from fd_large.errors import ConfigError, DataError, masked
from fd_large.files import kind_of, read_json
from fd_large.recipes import registry
from fd_large.recipes.fields import flat_plain
from fd_large.recipes.file_names import ENVIRONMENT, EVALUATIONS, METRICS, SUMMARY
from fd_large.recipes.left import LEFT
from fd_large.recipes.row_files import Line, lines_of, newest_line, numbers_of
from fd_large.recipes.stored import recipe_file
from fd_large.tasks.registry import TASKS

_WHERE = "report"
_KINDS: dict[type | UnionType, tuple[str, ...]] = {
    str: ("status", "reason", "start", "host", "platform", "device", "launcher", "python"),
    int: ("world_size", "total_updates", "peak_memory_bytes"),
    int | float: ("images_per_second",),
    list: ("command", "next", "lower_is_better"),
    dict: ("metrics", "packages"),
}
"""Entries of summary.json and environment.json that a report uses, by their expected type."""


@dataclass(frozen=True)
class RunFiles:
    """Contents of a run's folder.

    Attributes:
        folder: The run's folder.
        recipe: Content of recipe.json.
        environment: Content of environment.json, or {} without the file.
        summary: Content of summary.json, or {} for a running or killed run without the file.
        updates: Number of finished steps at each of the n rows of metrics.jsonl, (n,), from 1.
        loss: Training loss of each row, (n,), with NaN for a skipped step.
        learning_rate: Learning rate of each row, (n,).
        rows: The rows of metrics.jsonl.
        evaluations: The rows of evaluations.jsonl, with `update` (finished steps) and metrics.
    """

    folder: Path
    recipe: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    updates: numpy.ndarray
    loss: numpy.ndarray
    learning_rate: numpy.ndarray
    rows: list[dict[str, Any]]
    evaluations: list[dict[str, float]]

    @property
    def saved(self) -> int | None:
        """Number of finished steps at the newest complete checkpoint, or None without any."""
        # Checkpoints that are still being written, or were set aside, have other names.
        names = [path.name for path in self.folder.glob("checkpoints/step_*")]
        steps = [name.removeprefix("step_") for name in names]
        return max((int(step) for step in steps if step.isdigit()), default=None)

    def has(self, name: str) -> bool:
        """Whether the run's folder has a file or folder with the name `name`."""
        return kind_of(self.folder / name) is not None

    @property
    def frozen_models(self) -> dict[str, dict[str, Any]]:
        """The recipe's section of each frozen model, {name: section}.

        The name is "teacher" for a single teacher, and "teacher NAME" for one of several. Models
        without a source of weights are left out.
        """
        sections = {k: v for k, v in self.recipe.items() if isinstance(v, dict)}
        several = sections.pop("teachers", {})
        sections |= {f"teacher {name}": entry for name, entry in several.items()}
        return {name: section for name, section in sections.items() if section.get("source")}

    @cached_property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Fields that differ from the published recipe, {field: (the run's value, the recipe's)}.

        The result is empty if no recipe has the run's name.
        """
        usual = {name: field.idle for name, field in LEFT.items()}
        try:
            usual |= flat_plain(registry.get(self.recipe["name"]).to_dict())
        except ConfigError:  # A recipe of the user's own, or of an earlier version.
            return {}
        return {
            name: (value, usual.get(name))
            for name, value in flat_plain(self.recipe).items()
            if value != usual.get(name)
        }

    @property
    def trained_loss(self) -> numpy.ndarray:
        """Training losses of the steps that were not skipped, in order."""
        return self.loss[numpy.isfinite(self.loss)]

    @property
    def measured(self) -> list[str]:
        """Names of the evaluated metrics to show, in order.

        Metrics with a label in environment.json are shown, or all metrics if none has a label.
        """
        names = list(dict.fromkeys(key for row in self.evaluations for key in row))
        listed = [name for name in self._metrics if name in names]
        return listed or [name for name in names if name != "update"]

    def words(self, name: str) -> str:
        """Returns the label of a metric.

        Args:
            name: Name of the metric; "loss" is the training loss.
        """
        return self._metrics.get(name, name.replace("_", " "))

    @property
    def losses(self) -> list[str]:
        """Names of the evaluated metrics that are the training loss on other images.

        An example is held_out_loss. The order is that of `measured`.
        """
        return [name for name in self.measured if self.kind(name) == "loss"]

    def kind(self, name: str) -> str:
        """Returns the metric `name` without its set of images, such as "loss" for held_out_loss.

        The metrics that environment.json lists say which part is the set. Other names are returned
        unchanged, unless they end in `_loss`.
        """
        pairs = (key.partition("/") for key in self.environment.get("metrics", {}))
        kinds = {f"{images}_{kind}": kind for images, _, kind in pairs}
        return kinds.get(name, "loss" if name.endswith("_loss") else name)

    @property
    def _metrics(self) -> dict[str, str]:
        metrics = self.environment.get("metrics", {})
        return {key.replace("/", "_"): words for key, words in metrics.items()}

    @property
    def task(self) -> str:
        """Name of the run's task, or "" if recipe.json has an invalid value."""
        section = self.recipe.get("task", {})
        name = section.get("name", "distillation") if isinstance(section, dict) else ""
        return name if isinstance(name, str) else ""

    def lower_is_better(self, name: str) -> bool:
        """Whether lower values of the metric `name` are better.

        The run's environment.json states this; for a run of an earlier version, or a metric without
        a label, its built-in task does. For the user's own task, it is then true of losses alone.
        """
        kind, known = self.kind(name), self.environment.get("lower_is_better")
        if known is not None and kind != name:
            return kind in known
        # An earlier version did not record this, or the metric has no label.
        usual = TASKS[self.task].lower_is_better if self.task in TASKS else ("loss",)
        return any(kind == suffix or kind.endswith(f"_{suffix}") for suffix in usual)

    def column(self, name: str) -> numpy.ndarray:
        """Returns the entry `name` of each of the n rows of metrics.jsonl, (n,).

        The value is NaN for a row without this entry.
        """
        return numpy.array([row.get(name, numpy.nan) for row in self.rows], dtype=numpy.float64)

    def evaluated(self, name: str) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Returns the numbers of finished steps at which a metric was evaluated, and its values.

        Args:
            name: Name of the metric in evaluations.jsonl.

        Returns: two arrays (m,), of m evaluations that have the metric.
        """
        rows = [row for row in self.evaluations if row.get(name) is not None]
        return numpy.array([row["update"] for row in rows]), numpy.array([r[name] for r in rows])


def read_run(folder: str | Path, *, newest_row: bool = False) -> RunFiles:
    """Reads a run's folder.

    Args:
        folder: The run's folder.
        newest_row: Whether to read only the last complete row of metrics.jsonl, which is quick.

    Raises:
        ConfigError: If the folder is not a run's.
        DataError: If a file in the folder is damaged.
    """
    folder = Path(folder)
    recipe = masked(_recipe(recipe_file(folder, where=_WHERE)))
    lines = newest_line(folder / METRICS) if newest_row else lines_of(folder / METRICS)
    rows = _rows(folder / METRICS, lines, "loss", "learning_rate")
    return RunFiles(
        folder=folder,
        recipe=recipe,
        environment=_object(folder / ENVIRONMENT),
        summary=_summary(folder / SUMMARY),
        updates=numpy.array([row["update"] + 1 for row in rows], dtype=numpy.int64),
        loss=numpy.array(
            [numpy.nan if row.get("skipped") else row["loss"] for row in rows], dtype=numpy.float64
        ),
        learning_rate=numpy.array([row["learning_rate"] for row in rows], dtype=numpy.float64),
        rows=rows,
        evaluations=_evaluations(folder / EVALUATIONS),
    )


def _object(path: Path) -> dict[str, Any]:
    if not kind_of(path, where=_WHERE):
        return {}
    remedy = "Remove the file and report again."
    content = read_json(path, where=_WHERE, holds=dict, remedy=remedy, of=DataError)
    for kind, names in _KINDS.items():
        for name in names:
            if content.get(name) is not None and not isinstance(content[name], kind):
                problem = f"{name} {json.dumps(content[name])[:40]}"
                raise _damaged(path, problem, "what the run wrote", remedy)
    words = [*(content.get("command") or ()), *(content.get("metrics") or {}).values()]
    if not all(isinstance(word, str) for word in words):
        raise _damaged(path, "command or metrics that are not texts", "what the run wrote", remedy)
    # A field that is null counts as absent.
    return masked({name: value for name, value in content.items() if value is not None})


def _recipe(path: Path) -> dict[str, Any]:
    remedy = "Restore the file and report again."
    recipe = read_json(path, where=_WHERE, holds=dict, remedy=remedy, of=DataError)
    if not isinstance(recipe.get("name"), str) or not isinstance(recipe.get("data"), dict):
        raise _damaged(path, "a recipe without name or data", "what the run wrote", remedy)
    return recipe


def _summary(path: Path) -> dict[str, Any]:
    summary = _object(path)
    best = summary.get("best")
    if best is not None and not (
        isinstance(best, dict)
        and isinstance(best.get("metric"), str)
        and all(_is_number(best.get(name)) for name in ("update", "value"))
    ):
        expected = "an object with update, metric and value"
        remedy = "Remove the file and report again."
        raise _damaged(path, f"best {json.dumps(best)[:40]}", expected, remedy)
    return summary


def _rows(path: Path, lines: list[Line], *numbers: str) -> list[dict[str, Any]]:
    """Returns the rows in a file's lines; an incomplete last line is left out.

    Args:
        path: The file, for messages.
        lines: The lines of the file.
        numbers: Names of the entries that each row must have as a number or null. A skipped step
            may lack `loss`.

    Raises: DataError: if a line cannot be read, or lacks an entry.
    """
    # The last line of a run that goes on, or was killed, may be torn.
    if lines and not lines[-1].raw.endswith(b"\n"):
        lines.pop()
    remedy = (
        "Resume the run, which leaves out such lines and keeps the others; or delete these lines."
    )
    if damaged := [line for line in lines if line.row is None]:
        raise _damaged(path, f"{numbers_of(damaged)} that cannot be read", "rows only", remedy)
    rows = [line.row for line in lines if line.row is not None]
    for line, row in zip(lines, rows, strict=True):
        for name in numbers:
            skipped = row.get("skipped") and name == "loss"
            known = name in row and (row[name] is None or _is_number(row[name]))
            if not skipped and not known:
                problem = f"{numbers_of([line])} with {name} {json.dumps(row.get(name))[:40]}"
                raise _damaged(path, problem, "a number", "Correct or delete the line.")
    return rows


def _evaluations(path: Path) -> list[dict[str, Any]]:
    rows = _rows(path, lines_of(path))
    for row in rows:
        for name, value in row.items():
            if value is not None and not _is_number(value):
                problem = f"{name} {json.dumps(value)[:40]} of step {row['update']}"
                raise _damaged(path, problem, "a number", "Correct or delete the line.")
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _damaged(path: Path, got: object, expected: str, remedy: str) -> DataError:
    return DataError(f"{_WHERE}: {path} is damaged; got {got}, expected {expected}. {remedy}")

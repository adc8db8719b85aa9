"""Finds the runs below a folder, with their states and results, from their files alone."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fd_large.errors import FDError
from fd_large.files import unusable
from fd_large.recipes.architectures import full_name
from fd_large.recipes.fields import flat_plain
from fd_large.recipes.file_names import (
    CHECKPOINTS,
    EVALUATED,
    EVALUATIONS,
    EVENTS,
    INCIDENTS,
    LOGS,
    METRICS,
    PICTURES,
    RECIPE,
    is_run,
)
from fd_large.recipes.sections import STUDENTS
from fd_large.report.closing import RUNNING
from fd_large.report.run_files import RunFiles

# Folders of a run that hold no other run.
_OWN_FOLDERS = {CHECKPOINTS, EVALUATED, EVENTS, INCIDENTS, LOGS, PICTURES}
DONE, STOPPED, FAILED, KILLED, DAMAGED = "done", "stopped", "failed", "killed", "damaged"
"""States of a run that is not running.

In this order: the run is finished; it was stopped by a signal and saved; it was ended by an error
or the guard; it ended without a record; or its files cannot be read.
"""
STATES = (RUNNING, DONE, STOPPED, FAILED, KILLED, DAMAGED)
_STATES = {DONE: DONE, "preempted": STOPPED, "interrupted": STOPPED, "": KILLED}


class Value(NamedTuple):
    """Value of a metric in an evaluation.

    Attributes:
        value: The value.
        step: Number of finished steps at the evaluation.
    """

    value: float
    step: int


@dataclass(frozen=True)
class ListedRun:
    """Run in a list of runs.

    Attributes:
        folder: Folder of the run.
        state: "running", "done", "stopped" by a signal, "failed" by an error or the guard, "killed"
            without a record of its end, or "damaged" if its files cannot be read.
        files: Contents of the folder, or None if they cannot be read.
        problem: Reason why the run failed or cannot be read; "" otherwise.
    """

    folder: Path
    state: str
    files: RunFiles | None = None
    problem: str = ""

    @property
    def recipe(self) -> dict[str, Any]:
        """Content of recipe.json, or {} if the folder cannot be read."""
        return self.files.recipe if self.files else {}

    @property
    def student(self) -> str:
        """Name of the trained model, or "" if unknown."""
        section = self.recipe.get("student")
        named = isinstance(section, dict) and isinstance(section.get("model"), str)
        return full_name(section) if named else ""

    @property
    def fields(self) -> dict[str, Any]:
        """What conditions on runs can name, {name: value}.

        These are all fields of the recipe, by their full names (section.field), and three more:
        `recipe`, the recipe's name; `student`, the name of the model; and `state`.
        """
        named = {"recipe": self.recipe.get("name", ""), "student": self.student}
        return {**flat_plain(self.recipe), **named, "state": self.state}

    @property
    def step(self) -> int:
        """Number of finished steps."""
        return int(self.files.updates[-1]) if self.files and len(self.files.updates) else 0

    @property
    def steps(self) -> int | None:
        """Total number of steps of the run, or None if unknown."""
        if self.files is None:
            return None
        recorded = self.files.summary.get("total_updates")
        optim = self.recipe.get("optim")
        named = optim.get("max_steps") if isinstance(optim, dict) else None
        # The summary of a run that is not finished is that of an earlier start.
        goes_on = self.state in (RUNNING, KILLED)
        steps = (named or recorded) if goes_on else (recorded or named)
        return steps if isinstance(steps, int) and steps > 0 else None

    @property
    def loss(self) -> float | None:
        """Training loss of the newest step that was not skipped, or None if there is none."""
        losses = self.files.trained_loss if self.files else ()
        return float(losses[-1]) if len(losses) else None

    @property
    def written(self) -> float | None:
        """Unix time at which a metric or the recipe was last written, or None if unknown."""
        times = []
        for name in (METRICS, EVALUATIONS, RECIPE):
            try:
                times.append((self.folder / name).stat().st_mtime)
            except OSError:
                continue
        return max(times, default=None)

    @property
    def measured(self) -> list[str]:
        """Names of all evaluated metrics.

        The metrics with a label come first (`RunFiles.measured`), and among these and the others
        the losses of constant predictions come last.
        """
        rows = self.files.evaluations if self.files else []
        names = list(dict.fromkeys(key for row in rows for key in row if key != "update"))
        first = self.files.measured if self.files else []
        return sorted(names, key=lambda name: (name not in first, name.endswith("_best_constant")))

    @property
    def main_metric(self) -> str:
        """The metric that chooses the run's best checkpoint (`eval.best_metric`).

        If the run has not evaluated this metric, it is the first of `measured`, or "" without any.
        """
        section = self.recipe.get("eval")
        named = section.get("best_metric") if isinstance(section, dict) else None
        return named if named in self.measured else next(iter(self.measured), "")

    def last(self, metric: str) -> Value | None:
        """Returns the newest value of the metric `metric`, or None if it was not evaluated."""
        return next(reversed(self._values(metric)), None)

    def best(self, metric: str) -> Value | None:
        """Returns the best value of the metric `metric`, and of equal values the first.

        The evaluation before the first step and values that are not finite do not count. The
        result is None if there is no other value.
        """
        sign = 1 if self.lower_is_better(metric) else -1
        values = [each for each in self._values(metric) if each.step and math.isfinite(each.value)]
        return min(values, key=lambda each: (sign * each.value, each.step), default=None)

    def lower_is_better(self, metric: str) -> bool:
        """Whether lower values of the metric `metric` are better."""
        return self.files is not None and self.files.lower_is_better(metric)

    def _values(self, metric: str) -> list[Value]:
        rows = self.files.evaluations if self.files else []
        return [Value(row[metric], row["update"]) for row in rows if row.get(metric) is not None]


def find_runs(root: Path, on_error: Callable[[FDError], None]) -> Iterator[Path]:
    """Yields the folders of the runs below a folder, in the order of their names.

    The folder itself may be a run. For a run with several students, the students' folders are
    yielded. A symbolic link is followed only to a run outside of the folder.

    Args:
        root: The folder.
        on_error: Function that is called with the error of a folder that cannot be read.
    """
    whole, folders = root.resolve(), [root]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(folder) as entries:
                inner = sorted(entry.name for entry in entries if _leads_on(entry, whole))
            holds_run = is_run(folder)
        except OSError as error:
            on_error(unusable("runs", error, folder))
            continue
        except FDError as error:
            on_error(error)
            continue
        if holds_run:
            inner = [name for name in inner if name not in _OWN_FOLDERS]
            if not any(folder.glob(f"{STUDENTS}/*/{RECIPE}")):
                yield folder
        folders += [folder / name for name in reversed(inner)]


def _leads_on(entry: os.DirEntry[str], root: Path) -> bool:
    if entry.name.startswith("."):  # Such a folder may be a run that a start is moving aside.
        return False
    if not entry.is_symlink():
        return entry.is_dir()
    target = Path(entry.path).resolve()
    return entry.is_dir() and root not in target.parents and target != root and is_run(target)


def state_of(files: RunFiles) -> str:
    """Returns the state of a run that is not training now, from the status in its summary.json.

    The state is `DONE` for a finished run, `STOPPED` for one that a signal stopped, `KILLED` if
    there is no summary.json, and `FAILED` for every other status.
    """
    return _STATES.get(files.summary.get("status", ""), FAILED)

"""Names in a recipe, held against the package's tables before torch is imported."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fd_large import doors
from fd_large.errors import check_all
from fd_large.recipes.run import Run
from fd_large.recipes.tables import keys_of
from fd_large.recipes.task_kind import check_metric

_Table = tuple[str, doors.Kind, str, str]
# The field, what it names, and the file of the package with the table.
_OPTIMISERS: _Table = ("optim.name", "optimisers", "engine/zero/optimizer.py", "OPTIMISERS")
_TRACKERS: _Table = ("runtime.trackers", "trackers", "runtime/trackers.py", "TRACKERS")


def require_names(run: Run) -> None:
    """Refuses names of optimisers, trackers, metrics and parts of the task that stand for nothing.

    Raises: ConfigError: a line for each.
    """
    kind = run.task.kind()  # None for code that this process may not import.
    named = [(run.optim.name, *_OPTIMISERS)]
    named += [(name, *_TRACKERS) for name in run.runtime.trackers]
    checks: list[Callable[[], None]] = [partial(_require, *one) for one in named]
    if kind and kind.check_names:
        checks.append(partial(kind.check_names, run))
    if kind and kind.metrics and run.eval.best_metric:
        checks.append(partial(check_metric, run.eval.best_metric, kind.metrics(run)))
    check_all(*checks)


def _require(name: str, where: str, kind: doors.Kind, file: str, table: str) -> None:
    doors.require_known(name, kind=kind, where=where, built_in=keys_of(file, table))

"""Makes the three classes of a task that its `TaskKind` names: job, stored run and transfer.

The module of a class is imported when the class is first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from fd_large import doors, files
from fd_large.checkpoint import stream
from fd_large.engine.job import TrainingJob
from fd_large.errors import ConfigError, FDError
from fd_large.recipes.run import Run
from fd_large.tasks.registry import TASKS, kind_of
from fd_large.tasks.stored_run import StoredRun
from fd_large.tasks.transfer import Transfer
from fd_large.weights.export import HEADS
from fd_large.weights.read import read_json

# Methods of a job that need no collective and no model in memory.
_BEFORE_A_RUN = ("settle", "open_samples", "check", "tensor_sizes")
# Methods that jobs of earlier versions had, and the methods of `StoredRun` that replace them.
_OF_A_STORED_RUN = {
    "score_stored": "score",
    "stored_heads": "heads",
    **{name: name for name in ("predict", "learned", "exported_into", "losses_on")},
}
# Methods that the engine called on a job until version 0.1, and what it calls instead.
_FORMER = {
    "initial_heads": "its tensors in initial_weights(), a mapping by the names of modules",
    "parameter_sizes": "tensor_sizes()",
    "trained_sizes": "tensor_sizes()",
}


def job_of(recipe: Run | Mapping[str, Any]) -> TrainingJob:
    """Makes the job of a recipe's task.

    The methods of a user's own job that run before training raise ConfigError for any exception.

    Args:
        recipe: The recipe, or the mapping in which recipe.json and manifests store it.

    Raises:
        ConfigError: if a stored recipe cannot be read, or if the user's own task cannot be
            imported, gives no `TrainingJob`, or fails.
    """
    run = recipe if isinstance(recipe, Run) else Run.from_dict(recipe)
    name = run.task.name
    make = _class_of(kind_of(name).job)
    if name in TASKS:
        return make(run)
    job = _said(name, make)(run)
    if not isinstance(job, TrainingJob):
        raise ConfigError(
            f"task.name: not a job; got {type(job).__name__} from {name}, expected a subclass of "
            "fd_large.engine.job.TrainingJob. docs/extending.md has an example."
        )
    for former, now in _FORMER.items():
        if hasattr(job, former):
            raise ConfigError(
                f"task.name: {type(job).__name__}.{former} is not called by this version; got a "
                f"job with this method, expected {now}. Move the method there."
            )
    for method in _BEFORE_A_RUN:
        setattr(job, method, _said(name, getattr(job, method)))
    return job


def stored_run_of(job: TrainingJob) -> StoredRun:
    """Returns the `StoredRun` of a task, for the commands that read a run's folder.

    Args:
        job: The job of the run's recipe.

    Raises: ConfigError: if the user's own job has methods that belong to `StoredRun`.
    """
    kind = job.run.task.kind()
    if kind is None or not kind.stored:
        for method, now in _OF_A_STORED_RUN.items():
            if hasattr(job, method):
                raise ConfigError(
                    f"task.name: {type(job).__name__}.{method} is not called by this version; got "
                    "a job with this method, expected a subclass of "
                    f"fd_large.tasks.stored_run.StoredRun with {now}(). Move the method there, "
                    "and name the class in TaskKind(stored=...)."
                )
        # A job of the user's own that is one of ours is stored as ours is.
        bases = {f"{base.__module__}.{base.__qualname__}" for base in type(job).__mro__}
        for known in TASKS.values():
            if known.stored and f"fd_large.tasks.{known.job}" in bases:
                return _class_of(known.stored)(job)
        return StoredRun(job)
    return _class_of(kind.stored)(job)


def transfer_of(task: str) -> Transfer:
    """Returns the `Transfer` of a task.

    Args:
        task: Value of `task.name` in a recipe.

    Raises: ConfigError: if the task cannot begin from a named model.
    """
    kind = kind_of(task)
    if not kind.transfer:
        raise ConfigError(
            f"transfer: this task cannot begin from a named model; got {task}, expected one of "
            f"{', '.join(name for name, kind in TASKS.items() if kind.transfer)}. Name a recipe "
            "of one of these tasks."
        )
    return _class_of(kind.transfer)()


def heads_of(job: TrainingJob | None, folder: Path | None) -> Mapping[str, nn.Module]:
    """Returns {name: head} of a run, or of an export of a run's student (`StoredRun.heads`).

    The result is empty if `folder` is None, or if the run or the export has no heads.

    Args:
        job: The job of the run; None for an export.
        folder: Folder of the weights (`NamedModel.folder`); None if the weights are in no folder.

    Raises: FDError: if the heads cannot be read.
    """
    if folder is None:
        return {}
    if job is not None:
        return stored_run_of(job).heads(stream.newest(folder, where="heads"))
    config = folder / HEADS / "config.json"
    if files.kind_of(config) != "file":
        return {}
    kind = kind_of(read_json(config, where=str(config)).get("task", ""))
    return _class_of(kind.stored or StoredRun).exported_heads(config.parent)


def _class_of(face: str | Callable[[Any], Any]) -> Any:
    """Returns the class that a field of a `TaskKind` gives.

    Args:
        face: The field: a dotted name below tasks/, whose module is imported, or the class itself.
    """
    if callable(face):
        return face
    module, _, name = face.rpartition(".")
    return getattr(import_module(f"fd_large.tasks.{module}"), name)


def _said(task: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function of the user's own task so that it raises no exceptions but FDErrors.

    An FDError is passed on, and any other exception becomes a ConfigError.

    Args:
        task: Value of `task.name` in the recipe, for the message.
        function: The function to wrap.
    """

    @wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except FDError:
            raise
        except Exception as error:  # The user's code may raise anything.
            raise ConfigError(
                f"task.name: {task} fails before the run; got {doors.cause(error)}, expected a "
                "TrainingJob that makes its Module. Correct the file: task.SECTION has the fields "
                "of the TaskKind."
            ) from error

    return call

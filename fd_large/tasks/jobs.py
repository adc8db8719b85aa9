"""Makes the job that carries out the task of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from fd_large import doors, files
from fd_large.checkpoint import stream
from fd_large.engine.job import Job
from fd_large.errors import ConfigError, FDError
from fd_large.recipes.run import Run
from fd_large.tasks.registry import TASKS, kind_of
from fd_large.weights.export import HEADS
from fd_large.weights.read import read_json

# What a job does without a collective, and without a model in memory.
_BEFORE_A_RUN = ("settle", "open_samples", "check", "parameter_sizes", "trained_sizes")


def job_class(task: str) -> type[Job]:
    """Returns the class of the jobs of a task; imports that task only.

    Raises: ConfigError: if it is code of the user's own that cannot be imported.
    """
    kind = kind_of(task)
    if callable(kind.job):
        return kind.job
    return getattr(import_module(f"fd_large.tasks.{kind.folder}.job"), kind.job)


def job_of(recipe: Run | Mapping[str, Any]) -> Job:
    """Makes the job of a recipe's task.

    Args:
        recipe: The recipe, or what recipe.json and manifests hold of it.

    Raises: ConfigError: as `job_class`; if a stored recipe cannot be read, or the user's own job
        fails, here or in what it does before a run.
    """
    run = recipe if isinstance(recipe, Run) else Run.from_dict(recipe)
    name = run.task.name
    make = job_class(name)
    if name in TASKS:
        return make(run)
    job = _said(name, make)(run)
    if not isinstance(job, Job):
        raise ConfigError(
            f"task.name: no job; got {type(job).__name__} from {name}, expected a subclass of "
            "fd_large.engine.job.Job. docs/extending.md shows one."
        )
    for method in _BEFORE_A_RUN:
        setattr(job, method, _said(name, getattr(job, method)))
    return job


def heads_of(job: Job | None, source: Path) -> Mapping[str, nn.Module]:
    """Returns the heads of a run, or of an export of its student, by name; see `Job.stored_heads`.

    Args:
        job: The job of the run; None: the source is no run.
        source: The folder of a run or of a checkpoint, or what else a model was loaded from.

    Raises: FDError: if they cannot be read.
    """
    if job is not None:
        return job.stored_heads(stream.newest(source, where="heads"))
    config = source / HEADS / "config.json"
    if files.kind_of(config) != "file":
        return {}
    task = read_json(config, where=str(config)).get("task", "")
    return job_class(task).exported_heads(config.parent)


def _said(task: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of the user's own that ends in one sentence whatever it raises."""

    @wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except FDError:
            raise
        except Exception as error:  # The user's code may raise anything.
            raise ConfigError(
                f"task.name: {task} fails before the run; got {doors.cause(error)}, expected a Job "
                "that makes its Module; what it reads of task.SECTION is the section of its "
                "TaskKind. Correct the file."
            ) from error

    return call

"""Makes the job that carries out the task of a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from fd_large.engine.job import Job
from fd_large.recipes.run import Run
from fd_large.tasks.registry import kind_of


def job_class(task: str) -> Callable[[Run], Job]:
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

    Raises: ConfigError: as `job_class`; if a stored recipe cannot be read.
    """
    run = recipe if isinstance(recipe, Run) else Run.from_dict(recipe)
    return job_class(run.task.name)(run)

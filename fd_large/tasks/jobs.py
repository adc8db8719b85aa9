"""From a recipe to the job that carries out its task."""

from __future__ import annotations

from importlib import import_module

from fd_large.engine.job import Job
from fd_large.recipes.run import Run
from fd_large.tasks.registry import kind_of


def job_of(run: Run) -> Job:
    """Makes the job of a recipe's task; imports that task only.

    Raises: ConfigError: if it is code of the user's own that cannot be imported.
    """
    kind = kind_of(run.task.name)
    if callable(kind.job):
        return kind.job(run)
    return getattr(import_module(f"fd_large.tasks.{kind.folder}.job"), kind.job)(run)

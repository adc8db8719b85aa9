"""From a recipe to the job that carries out its task."""

from __future__ import annotations

from importlib import import_module

from fd_large.engine.job import Job
from fd_large.recipes.run import Run
from fd_large.tasks.registry import TASKS


def job_of(run: Run) -> Job:
    """Makes the job of a recipe's task; imports that task only."""
    kind = TASKS[run.task.name]
    return getattr(import_module(f"fd_large.tasks.{kind.folder}.job"), kind.job)(run)

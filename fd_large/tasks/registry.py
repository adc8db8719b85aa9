"""The tasks, by folder. Adding one is its folder and its name here.

Like the `section.py` of each task, this file does not import torch, and recipes may import it.
"""

from __future__ import annotations

from importlib import import_module

from fd_large.recipes.task_kind import TaskKind

FOLDERS = (
    "distillation",
    "finetuning",
    "detection",
)


def _kinds() -> dict[str, TaskKind]:
    kinds = (import_module(f"fd_large.tasks.{folder}.section").KIND for folder in FOLDERS)
    return {kind.name: kind for kind in kinds}


TASKS = _kinds()
"""The kinds of tasks, by their name in recipes (`task.name`)."""

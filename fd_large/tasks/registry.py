"""The table of tasks. To add a task, add its folder in `tasks/` and its `TaskKind` in this file.

Like the `section.py` of each task, this file does not import torch, and recipes may import it.
"""

from __future__ import annotations

from fd_large import doors
from fd_large.errors import ConfigError
from fd_large.recipes.task_kind import TaskKind
from fd_large.tasks.classification.section import FINETUNE, LINEAR
from fd_large.tasks.depth.section import KIND as DEPTH
from fd_large.tasks.detection.section import KIND as DETECTION
from fd_large.tasks.distillation.section import KIND as DISTILLATION
from fd_large.tasks.segmentation.section import KIND as SEGMENTATION

_KINDS = (DISTILLATION, FINETUNE, LINEAR, DETECTION, SEGMENTATION, DEPTH)
TASKS = {kind.name: kind for kind in _KINDS}
"""The kinds of tasks, by their name in recipes (`task.name`)."""


def kind_of(name: str) -> TaskKind:
    """Returns the `TaskKind` of a built-in task or of the user's own task.

    Args:
        name: Value of `task.name` in a recipe.

    Raises:
        ConfigError: if the task does not exist, cannot be imported, is no `TaskKind`, or is the
            user's own and has the name of a built-in task.
    """
    kind = doors.load(name, kind="tasks", where="task.name", built_in=TASKS)
    if not isinstance(kind, TaskKind):
        raise ConfigError(
            f"task.name: not a task; got {type(kind).__name__} from {name}, expected a TaskKind. "
            "docs/extending.md has an example."
        )
    if name not in TASKS and kind.name in {"name", *TASKS}:
        raise ConfigError(
            f"task.name: {name} has the name of a built-in task, or the name 'name'; got "
            f"{kind.name!r}, expected none of 'name', {', '.join(TASKS)}. Give the TaskKind "
            "another name."
        )
    return kind

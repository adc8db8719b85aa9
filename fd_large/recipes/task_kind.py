"""A task's description for the recipe, the command line and the report; no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """A task's description; each `tasks/NAME/section.py` holds one, named KIND.

    Attributes:
        name: Its name in a recipe (`task.name`). A task of the user's own is named there by the
            door that leads to it, and this is the name of its section alone.
        folder: Its folder in `tasks/`; empty for a task of the user's own.
        job: Name of its class in the folder's `job.py`; the class itself for a task of the user's
            own.
        section: Dataclass of its own settings, `task.NAME.FIELD`; None if it has none.
        sections: Names of the recipe's sections that are read by this task and not by all.
        evaluated_by: The test that `evaluate RUN` makes unless another is named: knn, linear or
            finetune; the task's own name if its job scores a stored run (`Job.score_stored`).
    """

    name: str
    folder: str = ""
    job: str | Callable[[Any], Any]
    section: type | None = None
    sections: tuple[str, ...] = ()
    evaluated_by: str = "knn"

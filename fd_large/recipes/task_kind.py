"""A task's description for the recipe, the command line and the report; no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """A task's description; each `tasks/NAME/section.py` holds one, named KIND.

    Attributes:
        name: Its name in a recipe (`task.name`).
        folder: Its folder in `tasks/`.
        job: Name of its class in the folder's `job.py`.
        section: Dataclass of its own settings, `task.NAME.FIELD`; None if it has none.
        sections: Names of the recipe's sections that no other task uses.
        evaluated_by: The test that `evaluate RUN` makes unless another is named: knn, linear or
            finetune; the task's own name if its job scores a stored run (`Job.score_stored`).
    """

    name: str
    folder: str
    job: str
    section: type | None = None
    sections: tuple[str, ...] = ()
    evaluated_by: str = "knn"

"""What the recipe, the command line and the report know of a task, without torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """A task's description; each `tasks/NAME/section.py` has one, named KIND.

    Attributes:
        name: Its name in a recipe (`task.name`).
        folder: Its folder in `tasks/`.
        job: Name of the class in the folder's `job.py` that carries it out.
        section: Dataclass of the fields that it alone reads, `task.NAME.FIELD`; None: it has none.
        sections: Sections of a recipe that it alone reads.
        loss: Words for its training loss, on axes and in tables.
    """

    name: str
    folder: str
    job: str
    section: type | None = None
    sections: tuple[str, ...] = ()
    loss: str

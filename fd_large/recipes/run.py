"""What a run is: a name and its sections.

`Run` holds everything that decides a run, except what the DeepSpeed JSON decides (ZeRO stage,
buckets, offload, hpZ). The command line, `recipe.json` of a run folder and the recipes are three
ways to the same object. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from typing import Any

from fd_large.errors import ConfigError, nearest
from fd_large.recipes.architectures import FAMILIES, Architecture, by_name, resolve
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.fields import check_types, flat, from_plain, override, plain, require
from fd_large.recipes.sections import (
    AUTO,
    Batch,
    Data,
    Engine,
    Eval,
    Guard,
    Optim,
    Runtime,
    Student,
)
from fd_large.recipes.task_kind import TaskKind
from fd_large.tasks.distillation.section import Objective, Teacher
from fd_large.tasks.registry import TASKS

# A field for each task that has a section of its own.
_TaskSections = make_dataclass(
    "_TaskSections",
    [
        (kind.name, kind.section, field(default_factory=kind.section))
        for kind in TASKS.values()
        if kind.section
    ],
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True, kw_only=True)
class Task(_TaskSections):
    """What the student is trained to do, and the settings of single tasks."""

    # What the student learns. distillation: the teacher's feature map. finetune: the labels of
    # images. detection: the boxes and masks of objects. The last two have no teacher.
    name: str = "distillation"

    def __post_init__(self) -> None:
        check_types(self, "task")
        if self.name not in TASKS:
            raise ConfigError(
                f"task.name: no such task; got {self.name!r}, {nearest(self.name, TASKS)}. Use one"
                " of these."
            )


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run: its name and its sections."""

    name: str
    student: Student
    teacher: Teacher = field(default_factory=Teacher)
    data: Data = field(default_factory=Data)
    objective: Objective = field(default_factory=Objective)
    task: Task = field(default_factory=Task)
    optim: Optim = field(default_factory=Optim)
    batch: Batch = field(default_factory=Batch)
    engine: Engine = field(default_factory=Engine)
    eval: Eval = field(default_factory=Eval)
    guard: Guard = field(default_factory=Guard)
    runtime: Runtime = field(default_factory=Runtime)

    def __post_init__(self) -> None:
        check_types(self, "run")
        # Unknown models and overrides that fit no model are found here, before any rank starts.
        for where, section in (("student", self.student), ("teacher", self.teacher)):
            if where == "teacher" and self.teacher.model == AUTO:
                continue  # Known once the weights are open, or there is none.
            try:
                resolve(section.model, section.architecture)
            except ConfigError as error:
                raise ConfigError(f"{where}.{error}") from None
        require(
            self.student_architecture().can_train,
            "student.model: models of this family are teachers only",
            self.student.model,
            f"a model of {', '.join(n for n, family in FAMILIES.items() if family.can_train)}",
        )
        for kind in TASKS.values():
            if kind.name != self.task.name:
                self._refuse_sections_of(kind)

    def _refuse_sections_of(self, kind: TaskKind) -> None:
        """Refuses settings of another task, because they would do nothing."""
        own = {name: getattr(self, name) for name in kind.sections}
        if kind.section:
            own[f"task.{kind.name}"] = getattr(self.task, kind.name)
        found: dict[str, tuple[Any, Any]] = {}
        for name, section in own.items():
            usual, given = flat(type(section)()), flat(section)
            found |= {f"{name}.{f}": (given[f], usual[f]) for f in given if given[f] != usual[f]}
        if found:
            fields, plural = ", ".join(found), "s" if len(found) > 1 else ""
            raise ConfigError(
                f"{fields}: the task {self.task.name} ignores the field{plural}; got "
                f"{', '.join(repr(value) for value, _ in found.values())}, expected "
                f"{', '.join(repr(value) for _, value in found.values())}. Leave out what you set "
                f"there, or choose a recipe of the task {self.task.name}."
            )

    @property
    def has_teacher(self) -> bool:
        """Whether the student learns from a teacher."""
        return "teacher" in TASKS[self.task.name].sections

    def student_architecture(self) -> FamilyArchitecture:
        """Returns the student's architecture with the overrides filled in."""
        return resolve(self.student.model, self.student.architecture)

    def teacher_architecture(self) -> FamilyArchitecture:
        """Returns the teacher's architecture with the overrides filled in.

        Raises: ConfigError: if the model is still `auto`; the weights decide it, once opened.
        """
        require(
            self.teacher.model != AUTO,
            "teacher.model: auto means the model that the weights belong to",
            f"teacher.source {self.teacher.source!r}",
            "opened weights",
            "Set --teacher.source, or name a model",
        )
        return resolve(self.teacher.model, self.teacher.architecture)

    def with_fields(self, values: Mapping[str, Any]) -> Run:
        """Returns the run with other values of some fields, {"optim.base_lr": 1e-4, ...}.

        A model of another family keeps none of the fields of the run's own.

        Raises: ConfigError: as `override`.
        """
        base = self
        for where in ("student", "teacher"):
            section = getattr(self, where)
            before, after = section.model, values.get(f"{where}.model")
            old, new = (by_name(name) for name in (before, after or before))
            if old and new and old.family != new.family:
                plain_model = replace(section, architecture=Architecture())
                base = replace(base, **{where: plain_model})
        return override(base, values)

    def run_dir(self) -> str:
        """Returns the folder of the run: runtime.run_dir, or runs/RECIPE if that is empty."""
        return self.runtime.run_dir or f"runs/{self.name}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the run as nested dicts, lists and plain values, as stored in `recipe.json`."""
        return plain(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """Returns the run that `to_dict` gave; an absent key takes the field's default.

        Raises:
            ConfigError: A key is unknown, a needed one absent, or a value of the wrong type.
        """
        return from_plain(cls, values, "")


def difference(a: Run, b: Run) -> dict[str, tuple[Any, Any]]:
    """Returns {"optim.base_lr": (value in a, value in b), ...} for the fields that differ."""
    flat_a, flat_b = flat(a), flat(b)
    return {name: (flat_a[name], flat_b[name]) for name in flat_a if flat_a[name] != flat_b[name]}

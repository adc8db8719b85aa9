"""What a run is: a name and its sections.

`Run` holds everything that decides a run except what the DeepSpeed JSON owns (ZeRO stage, buckets,
offload, hpZ). The command line, `recipe.json` of a run folder and the recipes are three ways to the
same object. Standard library only.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fd_large.errors import ConfigError
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.recipes.fields import check_types, flat, from_plain, plain, require
from fd_large.recipes.sections import (
    AUTO,
    Batch,
    Data,
    Engine,
    Eval,
    Guard,
    Objective,
    Optim,
    Runtime,
    Student,
    Task,
    Teacher,
)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run, whole: a name and its sections."""

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
            self.student_architecture().family not in ("timm", "module"),
            "student.model: models of timm, or of one's own, only teach",
            self.student.model,
            "a model of the families swinv2, swin or vit",
        )
        require(
            self.has_teacher or self.teacher == Teacher(),
            f"teacher: the task {self.task.name} has none",
            f"teacher.model {self.teacher.model!r}, teacher.source {self.teacher.source!r}",
            "nothing set",
            "Leave out --teacher.*, or choose a recipe that distils",
        )
        for name in ("finetune", "detection"):
            own = getattr(self.task, name)
            require(
                name == self.task.name or own == type(own)(),
                f"task.{name}: the task {self.task.name} does not read it",
                "fields that are set",
                "nothing set",
                f"Leave out --task.{name}.*, or choose a recipe of that task",
            )

    @property
    def has_teacher(self) -> bool:
        """Whether the task learns from a teacher."""
        return self.task.name == "distillation"

    def student_architecture(self) -> Architecture:
        """Returns the student's architecture with the overrides filled in."""
        return resolve(self.student.model, self.student.architecture)

    def teacher_architecture(self) -> Architecture:
        """Returns the teacher's architecture with the overrides filled in.

        Raises: ConfigError: while the model is `auto`, which the weights decide (weights/settle.py).
        """
        require(
            self.teacher.model != AUTO,
            "teacher.model: auto is the model of the weights",
            f"teacher.source {self.teacher.source!r}",
            "weights to be opened first",
            "Set --teacher.source, or name a model",
        )
        return resolve(self.teacher.model, self.teacher.architecture)

    def run_dir(self) -> str:
        """Returns the folder of the run: the named one, else runs/RECIPE."""
        return self.runtime.run_dir or f"runs/{self.name}"

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dicts, lists and plain values only, as `recipe.json` holds them."""
        return plain(asdict(self))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """Returns the run that `to_dict` wrote; a key that is absent takes the field's default.

        Raises:
            ConfigError: A key is unknown, a needed one absent, or a value of the wrong type.
        """
        return from_plain(cls, values, "")


def difference(a: Run, b: Run) -> dict[str, tuple[Any, Any]]:
    """Returns {"optim.base_lr": (value in a, value in b), ...} for the fields that differ."""
    flat_a, flat_b = flat(a), flat(b)
    return {name: (flat_a[name], flat_b[name]) for name in flat_a if flat_a[name] != flat_b[name]}

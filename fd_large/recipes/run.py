"""Recipe of a run, which is a name and several sections.

`Run` holds all settings of a run except those in the DeepSpeed JSON (ZeRO stage, buckets, offload,
hpZ). The command line, `recipe.json` of a run folder and the published recipes all produce this
object. Only the standard library is imported.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from fd_large import doors
from fd_large.errors import ConfigError, ConflictError
from fd_large.recipes.architectures import Architecture, by_name, resolve
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.fields import (
    check_types,
    flat,
    from_plain,
    hints_of,
    is_name,
    override,
    plain,
    require,
)
from fd_large.recipes.left import without_left
from fd_large.recipes.sections import (
    AUTO,
    FEWEST_OF_NORM,
    RANDOM,
    STUDENTS,
    USUAL_NORM_BATCH,
    Batch,
    Data,
    Engine,
    Eval,
    FrozenModel,
    Guard,
    NamedStudent,
    Optim,
    Runtime,
    Student,
)
from fd_large.recipes.task_kind import TaskKind
from fd_large.tasks.distillation.section import Mask, NamedTeacher, Objective, Teacher, Weighting
from fd_large.tasks.registry import TASKS, kind_of

# A field for each task that has a section of its own.
if TYPE_CHECKING:

    @dataclass(frozen=True, kw_only=True)
    class _TaskSections:
        def __getattr__(self, name: str) -> Any: ...

else:
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


UNNAMED = "unnamed"
"""Name of a published recipe before the registry gives it the name of its function."""


@dataclass(frozen=True, kw_only=True)
class Task(_TaskSections):
    """The name of the task that the student is trained for, and the settings of single tasks."""

    # Task for which the student is trained. distillation: the teacher's feature map; this task
    # alone has a teacher. finetune: the labels of images. linear: the labels of images, by a linear
    # layer on the features of the student, which keeps its weights. detection: the boxes and masks
    # of objects. segmentation: the class of each pixel. depth: the depth of each pixel. A task of
    # your own: module:PATH/TO/FILE.py:NAME (docs/extending.md).
    name: str = "distillation"

    def __post_init__(self) -> None:
        check_types(self, "task")
        self.kind()

    def kind(self) -> TaskKind | None:
        """Returns the task's description, or None if this process may not import the task's code.

        Raises: ConfigError: if the task does not exist.
        """
        if doors.is_own(self.name) and not doors.is_allowed(self.name):
            return None
        return kind_of(self.name)

    @classmethod
    def class_for(cls, values: Mapping[str, Any]) -> type[Task]:
        """Returns the class for the values of the section `task`.

        For a task of the user's own, the result is a subclass with a field for the section of the
        task. If this process may not import the task's code, the field is a plain dict.
        """
        name = values.get("name", Task.name)
        if not isinstance(name, str) or name in TASKS:
            return Task
        if doors.is_own(name) and not doors.is_allowed(name):
            stored = sorted(values.keys() - {f.name for f in fields(Task)})
            return _with_sections(tuple((key, dict[str, Any]) for key in stored))
        kind = kind_of(name)
        return _with_sections(((kind.name, kind.section),) if kind.section else ())

    def __reduce__(self) -> Any:
        # Classes that `class_for` makes have no name by which pickle could find them.
        return from_plain, (Task, plain(asdict(self)), "task.")


@cache
def _with_sections(sections: tuple[tuple[str, Any], ...]) -> type[Task]:
    return make_dataclass(
        "Task",
        [
            (name, kind, field(default_factory=kind if isinstance(kind, type) else dict))
            for name, kind in sections
        ],
        bases=(Task,),
        namespace={"__module__": __name__, "__doc__": Task.__doc__},
        frozen=True,
        kw_only=True,
    )


# Fields that a resume may change, besides those of its task (`TaskKind.may_change`): they do not
# change the result.
_MAY_CHANGE = {
    "batch.micro_batch_size",
    "data.cache",
    "data.cache_gb",
    "data.max_bad_fraction",
    "data.root",
    "data.workers",
    "engine.node_size",
    "engine.nvme_path",
    "eval.best_metric",
    "eval.patience",
    "guard.enabled",
    "guard.roll_backs",
    "guard.skips",
    "guard.spread",
    "runtime.canary_every",
    "runtime.keep_every",
    "runtime.keep_last",
    "runtime.log_every",
    "runtime.max_failed_saves",
    "runtime.name",
    "runtime.notice_seconds",
    "runtime.preemption",
    "runtime.run_dir",
    "runtime.save_every",
    "runtime.save_minutes",
    "runtime.tags",
    "runtime.trackers",
    "runtime.watchdog_seconds",
    "student.activation_checkpointing",
    "student.attention_memory",
    "student.checkpoint_every",
}


# Sections of a run with one teacher; of several, each has these fields in its own entry.
_OF_ONE_TEACHER = ("teacher", "objective")
ONLY = ""
"""Key of the teacher in `Run.taught_by`, if a run has only one."""
_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TEACHERS_NAME = re.compile(r"[a-z][a-z0-9_]*(?<!_summary)")
# Names that mean something else in RUN#NAME.
_TAKEN = ("student", "scratch", "projector")

# Fields that a job may complete from the weights (`TrainingJob.settle`); the recipe.json of a run
# has them completed.
_COMPLETED_BY_WEIGHTS = (
    "student",
    "teacher",
    "task.",
    "objective.interpolation",
    "objective.teacher_image_size",
)

# What decides the length of a run and of its schedule.
LENGTH = ("optim.epochs", "optim.max_steps")


def _is_longer(before: Optim, now: Optim) -> bool:
    """Whether the length of a run in `now` is larger than in `before`, so that it may continue.

    If both lengths are in steps (`max_steps`), the number of epochs must also be the same. If one
    length is in epochs and the other in steps, the result is True, since they can be compared only
    when the number of steps of an epoch is known.
    """
    if bool(before.max_steps) != bool(now.max_steps):
        return True
    if now.max_steps:
        return now.max_steps > before.max_steps and now.epochs == before.epochs
    return now.epochs > before.epochs


@dataclass(frozen=True, kw_only=True)
class Run:
    """A whole run: its name and its sections."""

    name: str
    student: Student
    # Several students that learn from the same batches, by names of your own. A field that is not
    # set for a student has its value in the section student. Each student has a run folder,
    # RUN/students/NAME.
    students: dict[str, NamedStudent] = field(default_factory=dict)
    teacher: Teacher = field(default_factory=Teacher)
    # Several teachers, by names of your own. They replace the sections teacher and objective, which
    # then keep their defaults.
    teachers: dict[str, NamedTeacher] = field(default_factory=dict)
    weighting: Weighting = field(default_factory=Weighting)
    mask: Mask = field(default_factory=Mask)
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
        is_name("name", self.name)
        # Unknown models and overrides that fit no model are found here, before any rank starts.
        for where, section in self._models().items():
            if section.model == AUTO and isinstance(section, FrozenModel):
                continue  # The model is known once the weights are open, or the model is absent.
            try:
                resolve(section.model, section.architecture)
            except ConflictError as error:
                raise error.renamed(partial(operator.add, f"{where}.")) from None
            except ConfigError as error:
                raise ConfigError(f"{where}.{error}") from None
        self._check_teachers()
        for name in self.students:
            require(
                bool(_NAME.fullmatch(name)),
                f"students.{name}: not a name for a student",
                repr(name),
                "small letters, digits and underscores, beginning with a letter",
                "Choose another name",
            )
        if read := self.task.kind():
            for kind in TASKS.values():
                if kind.name != self.task.name:
                    self._refuse_sections_of(kind, read)

    def _models(self) -> dict[str, Student | FrozenModel]:
        """Returns the sections that describe a model, {full name: section}.

        The names are "student", "teacher", and "students.NAME" and "teachers.NAME" for each entry.
        """
        several = _named("teachers", self.teachers) | _named("students", self.students)
        return {"student": self.student, "teacher": self.teacher, **several}

    def _with_model(self, where: str, section: Any) -> Run:
        """Returns the run with one section replaced; `where` is its key in `_models`."""
        group, _, name = where.partition(".")
        changed: dict[str, Any] = {group: section}
        if name:
            changed[group] = {**getattr(self, group), name: section}
        return replace(self, **changed)

    def _check_teachers(self) -> None:
        """Checks the sections about teachers.

        Raises: ConfigError: if a teacher's name is ambiguous, if both one teacher and several are
            set, or if weighting is set for fewer than two teachers.
        """
        for name in self.teachers:
            if not _TEACHERS_NAME.fullmatch(name) or name in _TAKEN:
                raise ConfigError(
                    f"teachers.{name}: not a name for a teacher; got {name!r}, expected small "
                    f"letters, digits and underscores, beginning with a letter, not ending in "
                    f"_summary, and none of {', '.join(_TAKEN)}. Choose another name."
                )
        settings = _set_fields({n: getattr(self, n) for n in _OF_ONE_TEACHER})
        if self.teachers and settings:
            name, (got, usual) = next(iter(settings.items()))
            raise ConfigError(
                f"{name}: not used with several teachers; got {got!r} beside the "
                f"teachers {', '.join(self.teachers)}, expected {usual!r}. Set the field for a "
                f"teacher: --teachers.{next(iter(self.teachers))}.{name.partition('.')[2]}."
            )
        if self.weighting != Weighting() and len(self.teachers) < 2:
            raise ConfigError(
                f"weighting: needs several teachers; got {self.weighting.rule} for one teacher, "
                "expected several teachers. Leave out weighting, or name teachers "
                "(docs/several_teachers.md)."
            )

    def _refuse_sections_of(self, kind: TaskKind, read: TaskKind) -> None:
        """Refuses settings that only another task `kind` reads, since they would have no effect.

        The run's own task is `read`.

        Raises: ConfigError: with the fields that are set.
        """
        sections = {
            name: getattr(self, name) for name in kind.sections if name not in read.sections
        }
        for several in ("teachers", "students"):
            sections |= _named(several, sections.pop(several, {}))
        if kind.section:
            sections[f"task.{kind.name}"] = getattr(self.task, kind.name)
        if settings := _set_fields(sections):
            fields, plural = ", ".join(settings), "s" if len(settings) > 1 else ""
            raise ConfigError(
                f"{fields}: the task {self.task.name} ignores the field{plural}; got "
                f"{', '.join(repr(value) for value, _ in settings.values())}, expected "
                f"{', '.join(repr(value) for _, value in settings.values())}. Leave out these "
                f"settings, or choose a recipe of the task {self.task.name}."
            )

    @property
    def frozen_models(self) -> dict[str, FrozenModel]:
        """The frozen models of the run by section, as "teacher" or "teachers.NAME".

        If this process may not import the task's code, all sections of frozen models are returned
        that differ from their defaults.
        """
        kind = self.task.kind()
        sections = {f.name: getattr(self, f.name) for f in fields(self)}
        several = self.teachers if kind is None or "teachers" in kind.sections else {}
        return {f"teachers.{name}": section for name, section in several.items()} or {
            name: section
            for name, section in sections.items()
            if isinstance(section, FrozenModel)
            and (name in kind.sections if kind else section != type(section)())
        }

    @property
    def frozen_dtype(self) -> str:
        """The data type of the frozen models, or "auto" without frozen models.

        If the models have different data types, the result is "float32".
        """
        dtypes = {getattr(model, "dtype", AUTO) for model in self.frozen_models.values()}
        return dtypes.pop() if len(dtypes) == 1 else "float32" if dtypes else AUTO

    def student_architecture(self) -> FamilyArchitecture:
        """Returns the architecture of the student, with the fields that the recipe changes."""
        return resolve(self.student.model, self.student.architecture)

    @property
    def taught_by(self) -> dict[str, NamedTeacher]:
        """The teachers with their objectives, by name; a single teacher has the name "".

        The sections `teacher` and `objective` of a single teacher are joined to an entry like those
        of several teachers.
        """
        return self.teachers or {ONLY: NamedTeacher.joined(self.teacher, self.objective)}

    def with_taught_by(self, teachers: dict[str, NamedTeacher]) -> Run:
        """Returns the run with other teachers, which have the same keys as `taught_by`."""
        if self.teachers:
            return replace(self, teachers=teachers)
        teacher, objective = teachers[ONLY].parted()
        return replace(self, teacher=teacher, objective=objective)

    def in_one_process(self) -> Run:
        """Returns the same run with every teacher whole on each rank instead of sharded."""
        entries = self.taught_by.items()
        return self.with_taught_by({n: replace(e, placement="replicated") for n, e in entries})

    def with_fields(self, values: Mapping[str, Any], *, stay: Collection[str] = ()) -> Run:
        """Returns the run with other values of some fields.

        Some values reset other fields to their defaults. With a model of another family, the fields
        of the old model are reset; with another task, the sections that only the old task reads;
        and with other weights of a teacher, the teacher's model. Named teachers replace the run's
        single teacher. A new named student starts from the run's section `student`. Some fields
        change with others, as the end of the learning rate with the peak (`Optim.implied`).

        Args:
            values: The values by full name, {"optim.base_lr": 1e-4, ...}.
            stay: Full names of fields that do not change with others.

        Raises:
            ConfigError: If a field does not exist or has an invalid value, or if the task cannot be
                imported.
        """
        base = self
        task = values.get("task.name", self.task.name)
        if task != self.task.name:
            base = replace(
                base, task=Task.class_for({"name": task})(name=task), **_unread(kind_of(task))
            )
        if not base.teachers and any(name.startswith("teachers.") for name in values):
            base = replace(base, **{name: hints_of(Run)[name]() for name in _OF_ONE_TEACHER})
        of_all = {n.removeprefix("student."): v for n, v in values.items() if n[:8] == "student."}
        come = dict.fromkeys(name.split(".")[1] for name in values if name[:9] == "students.")
        for name in [name for name in come if name not in base.students]:
            student_fields = {f.name: getattr(base.student, f.name) for f in fields(Student)}
            base = replace(base, students={**base.students, name: NamedStudent(**student_fields)})
            values = {f"students.{name}.{n}": v for n, v in of_all.items()} | dict(values)
        for where, section in base._models().items():
            base = base._with_model(where, _with_other_model(section, where, values))
        implied = base.optim.implied(values)
        follow = {name: value for name, value in implied.items() if name not in stay}
        follow |= _ends_of_students(base.optim, {**follow, **values}, {*stay, *values})
        return override(base, {**values, **follow})

    def changes_since(self, stored: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Returns the fields that differ from a stored run's and that a resume may not change.

        Args:
            stored: The stored run, as a result of `to_dict`.

        Returns: {"optim.base_lr": (stored value, new value), ...}.
        Raises: ConfigError: if the stored run has an unknown or invalid field.
        """
        kind, before = self.task.kind(), Run.from_dict(stored)
        free = _MAY_CHANGE | set(kind.may_change if kind else ())
        if _is_longer(before.optim, self.optim):
            free |= set(LENGTH)
        changes = difference(before, self)
        if before.teachers.keys() != self.teachers.keys():
            changes = {n: v for n, v in changes.items() if not n.startswith("teachers.")}
            changes["teachers"] = (", ".join(before.teachers), ", ".join(self.teachers))
        if bool(before.students) != bool(self.students):
            changes = {n: v for n, v in changes.items() if not n.startswith("student")}
            changes["students"] = (", ".join(before.students), ", ".join(self.students))
        elif self.students:
            # A new student begins, and a missing one is left alone; section student is not read.
            both = [f"students.{name}." for name in before.students.keys() & self.students.keys()]
            changes = {
                n: v
                for n, v in changes.items()
                if not n.startswith("student") or n.startswith(tuple(both))
            }
            free |= {name.replace("student.", "students.*.", 1) for name in free}
        return {
            name: values
            for name, values in changes.items()
            if not any(fnmatchcase(name, pattern) for pattern in free)
        }

    def changes_before_weights(self, stored: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Returns the changes since a stored run that are certain before weights are read.

        These are the entries of `changes_since` without fields that may later be completed from
        weights, such as the model. For a task of the user's own, which may complete any field, the
        result is empty.
        """
        if self.task.name not in TASKS:  # A job of the user's own may complete any field.
            return {}
        changes = self.changes_since(stored)
        return {
            name: values
            for name, values in changes.items()
            if name == "task.name" or not name.startswith(_COMPLETED_BY_WEIGHTS)
        }

    def norm_batch(self) -> int:
        """Returns how many images the student's batch norms normalise by the same statistics.

        0 means that the running statistics of the initial weights are used. The result is
        `student.norm_batch`, but at most the global batch size. If the field is "auto", it is 0 for
        a student with initial weights (`student.init`), and otherwise the divisor of the global
        batch size that is nearest to `USUAL_NORM_BATCH`.
        """
        student, size = self.student, self.batch.global_batch_size
        if student.norm_batch != "auto":
            return min(student.norm_batch, size)
        if student.init:
            return 0
        sizes = range(min(FEWEST_OF_NORM, size), size + 1)
        divisors = (number for number in sizes if size % number == 0)
        return min(divisors, key=lambda number: abs(math.log(number / USUAL_NORM_BATCH)))

    def code(self) -> dict[str, str]:
        """Returns {name: SHA-256 of its file} for the user's own code that the run names."""
        students = self.students.values() or [self.student]
        sections: list[Student | FrozenModel] = [*students, *self.frozen_models.values()]
        models = [resolve(s.model, s.architecture).code for s in sections if s.model != AUTO]
        return doors.hashes([self.to_dict(), models])

    def each_student(self) -> dict[str, Run]:
        """Returns a run for each student, by name; a single student has the name "".

        Each of these runs, trained separately, would compute the same as the common run.
        """
        if not self.students:
            return {"": self}
        called = self.runtime.name
        return {
            name: replace(
                self,
                student=student.alone(),
                students={},
                optim=student.optimised(self.optim),
                runtime=replace(
                    self.runtime,
                    run_dir=f"{self.run_dir()}/{STUDENTS}/{name}",
                    name=f"{called} {name}" if called else "",
                ),
            )
            for name, student in self.students.items()
        }

    def run_dir(self) -> str:
        """Returns the folder of the run: runtime.run_dir, or runs/RECIPE if this field is empty."""
        return self.runtime.run_dir or f"runs/{self.name}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the run as nested dicts, lists and plain values, as stored in `recipe.json`."""
        values: dict[str, Any] = plain(asdict(self))
        # Runs with one of each are stored as they have been since the first release.
        if not self.teachers:
            del values["teachers"], values["weighting"]
        if not self.students:
            del values["students"]
        if self.mask == Mask():
            del values["mask"]
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Run:
        """Returns the run from a result of `to_dict`, which may be of an earlier version.

        Removed fields are ignored, and absent fields have their defaults.

        Raises:
            ConfigError: If a field is unknown, an absent field has no default, or a value is
                invalid.
        """
        return from_plain(cls, without_left(values), "")


def difference(a: Run, b: Run) -> dict[str, tuple[Any, Any]]:
    """Returns {"optim.base_lr": (value in `a`, value in `b`), ...} for the fields that differ.

    A value is None if the run does not have the field, such as one of a teacher of another name.
    """
    flat_a, flat_b = flat(a), flat(b)
    pairs = {name: (flat_a.get(name), flat_b.get(name)) for name in flat_a | flat_b}
    return {name: (first, second) for name, (first, second) in pairs.items() if first != second}


def _with_other_model(
    section: Student | FrozenModel, where: str, values: Mapping[str, Any]
) -> Student | FrozenModel:
    """Returns a model's section in which fields that new values invalidate are reset.

    `Run.with_fields` describes which values invalidate which fields. `where` is the full name of
    the section.
    """
    if isinstance(section, FrozenModel):
        source = values.get(f"{where}.source", section.source)
        if section.source not in ("", source) and source not in ("", RANDOM):
            section = replace(
                section, model=AUTO, architecture=Architecture(), statistics=(), allow=()
            )
    after = values.get(f"{where}.model", section.model)
    old, new = by_name(section.model), by_name(after)
    if old and new and old.family != new.family:
        section = replace(section, architecture=Architecture())
        if isinstance(section, Student):
            section = section.without_rules_unknown_to(new)
    return section


def _ends_of_students(optim: Optim, values: Mapping[str, Any], named: set[str]) -> dict[str, float]:
    """Returns {full name: learning rate} for students whose own peak rate is among new values.

    The rates are those at the start of the warm-up and at the end of the schedule. Their ratios to
    the student's peak are those in the section `optim`. A rate is left out if `named`, the full
    names of fields that do not change with others, has the rate's own field, or the field of this
    rate in `optim`.
    """
    ending = ".base_lr"
    peaks = {n.removesuffix(ending): v for n, v in values.items() if n.endswith(ending)}
    of_all = peaks.pop("optim", optim.base_lr)
    ends = {end: values.get(f"optim.{end}", getattr(optim, end)) for end in ("warmup_lr", "min_lr")}
    rates = (of_all, *ends.values(), *peaks.values())
    if not of_all or not all(isinstance(rate, int | float) for rate in rates):
        return {}
    return {
        f"{student}.{end}": rate * (peak / of_all)
        for student, peak in peaks.items()
        for end, rate in ends.items()
        if named.isdisjoint((f"optim.{end}", f"{student}.{end}"))
    }


def _named(group: str, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {"GROUP.NAME": entry} for the `entries`, {NAME: entry}, of the field `group`."""
    return {f"{group}.{name}": entry for name, entry in entries.items()}


def _set_fields(sections: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns {full name: (value, default)} of the fields that differ from their defaults.

    `sections` are given by their full names. Fields with the value "auto" are left out.
    """
    settings: dict[str, tuple[Any, Any]] = {}
    for name, section in sections.items():
        usual, values = flat(_usual(section)), flat(section)
        set_ones = [f for f in values if values[f] not in (usual[f], AUTO)]
        settings |= {f"{name}.{f}": (values[f], usual[f]) for f in set_ones}
    return settings


def _usual(section: Any) -> Any:
    """Returns a section of the class of `section` in which all fields have their defaults.

    A student's field `model` has no default, and is "".
    """
    return type(section)(model="") if isinstance(section, Student) else type(section)()


def _unread(read: TaskKind) -> dict[str, Any]:
    """Returns the recipe's sections that the task `read` does not read, {name: default value}.

    Sections that all tasks read are not among them.
    """
    names = {name for kind in TASKS.values() for name in kind.sections} - set(read.sections)
    # The types of several teachers and students are called like a dict, and give an empty one.
    return {name: hints_of(Run)[name]() for name in names}

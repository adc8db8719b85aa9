"""A run whose sources are settled: teacher and student have the architecture that the files show.

What keys tell is a fact; what they cannot tell comes from the format, a configuration beside the
file, the named model or the user, and is asked for where nothing tells.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any

from fd_large.backbones.statistics import Statistics
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import (
    ARCHITECTURES,
    Architecture,
    field_names,
    overrides,
    resolve,
    whole,
)
from fd_large.recipes.family import FamilyArchitecture, Transformer
from fd_large.recipes.run import Run, Task
from fd_large.recipes.sections import AUTO, FrozenModel, Student
from fd_large.weights.facts import statistics_of
from fd_large.weights.source import MODULE, TIMM, Weights, open_weights

log = logging.getLogger(__name__)

# A model may have these otherwise than its file: tables are resized, coordinates scaled.
_RESIZABLE = ("image_size", "window_size", "pretrained_window_sizes")
# No file has an opinion on these.
_OURS = ("keep_distillation_token",)


def settle(run: Run) -> Run:
    """Returns the run with the teacher's and the student's model as their files show them.

    Reads headers only. Sources `timm:` and `module:` become models of these families. To be called
    before anything is built; a settled run is settled again without change.

    Raises: WeightsError: if a file cannot be read, does not hold the named model, or leaves fields
        open that nothing tells; ConfigError: if a model cannot be as it is described.
    """
    settled = replace(run, teacher=settle_model(run.teacher), student=_student(run.student))
    return replace(settled, task=_task(settled))


def settle_model(teacher: FrozenModel) -> FrozenModel:
    """Returns the section with the model as its weights show it; reads headers only."""
    where = "--teacher.source"
    if teacher.source.startswith(TIMM):
        return _of_timm(teacher)
    if teacher.source.startswith(MODULE):
        given = Architecture(family="module", function=teacher.source.removeprefix(MODULE))
        return replace(teacher, model="module", architecture=given)
    if teacher.source in ("", "random") or _is_foreign(teacher):
        return teacher
    weights = open_weights(teacher.source, where=where)
    # A family alone names no model: its fields are all the user's, or a settled run's.
    by_itself = teacher.model == AUTO or teacher.model not in ARCHITECTURES
    named = None if by_itself else resolve(teacher.model)
    architecture = reconcile(
        weights, teacher.architecture, named, name=teacher.model, where=where, section="teacher"
    )
    statistics = teacher.statistics
    if not statistics and weights.statistics is not None:
        statistics = (*weights.statistics.mean, *weights.statistics.std)
    if not statistics and teacher.model == AUTO:
        log.warning(
            "%s: nothing tells the image statistics of the weights: ImageNet's are used "
            "(--teacher.statistics)",
            where,
        )
    model = architecture.family if by_itself else teacher.model
    return replace(
        teacher,
        model=model,
        source=weights.source,
        architecture=overrides(architecture, named),
        statistics=tuple(map(float, statistics)),
    )


def _student(student: Student) -> Student:
    if not student.init:
        return student
    weights = open_weights(student.init, where="--student.init")
    named = resolve(student.model)
    architecture = reconcile(
        weights,
        student.architecture,
        named,
        name=student.model,
        where="--student.init",
        section="student",
    )
    return replace(student, init=weights.source, architecture=overrides(architecture, named))


def _task(run: Run) -> Task:
    """With the statistics that the student's weights were trained with, where it sees no other."""
    own = run.task.finetune
    if run.task.name != "finetune" or own.statistics or not run.student.init:
        return run.task
    found = open_weights(run.student.init, where="--student.init").statistics
    if found is None:
        found = statistics_of(run.student.model)
    statistics = tuple(map(float, (*found.mean, *found.std)))
    return replace(run.task, finetune=replace(own, statistics=statistics))


def _is_foreign(teacher: FrozenModel) -> bool:
    """Whether the named model is timm's, whose files timm_backbone.py reads."""
    if teacher.model == AUTO:
        return False
    return not isinstance(resolve(teacher.model, teacher.architecture), Transformer)


def _of_timm(teacher: FrozenModel) -> FrozenModel:
    from fd_large.weights import timm_config
    from fd_large.weights.timm_backbone import strides

    name = teacher.source.removeprefix(TIMM)
    stride = teacher.architecture.feature_stride
    if stride is None:
        stride = max(strides(name))
        log.info("--teacher.source: %s: the map at stride %d, its last", teacher.source, stride)
    given = replace(Architecture(), timm_name=name, feature_stride=stride)
    statistics = teacher.statistics
    if not statistics:
        found = timm_config.statistics_of(name)
        statistics = (*found.mean, *found.std)
    return replace(
        teacher, model="timm", architecture=given, statistics=tuple(map(float, statistics))
    )


def reconcile(
    weights: Weights,
    given: Architecture,
    named: FamilyArchitecture | None,
    *,
    name: str,
    where: str,
    section: str,
) -> FamilyArchitecture:
    """Returns the architecture of a model that takes the weights, every field of its family set.

    Args:
        weights: Opened.
        given: The user's fields, which come first.
        named: Of the named model; None: the model is what the file shows.
        name: Of the named model, for messages.
        where: What the user set, for messages.
        section: "teacher" or "student"; "": flags have none.

    Raises: WeightsError: if file and model differ, or a field is known to nobody.
    """
    family = weights.format.family
    if named is not None and named.family != family:
        raise WeightsError(
            f"{where}: {weights.what}: a model of another family; got {family}, expected "
            f"{named.family} (model {name}). {_name_another(section, family)}"
        )
    values: dict[str, Any] = {"family": family}
    open_fields, conflicts = list(weights.unknown(given)), []
    depths = weights.found.depths or (0,)
    for field in sorted(field_names(family)):
        user, net = getattr(given, field), named and getattr(named, field)
        shown, told = getattr(weights.found, field), getattr(weights.told, field)
        if field in _OURS:
            values[field] = next(v for v in (user, net, False) if v is not None)
        elif field in _RESIZABLE:
            values[field] = next((v for v in (user, net, shown, told) if v is not None), None)
        else:
            fact = shown if shown is not None else told if user is None else None
            wanted = user if user is not None else net
            if fact is not None and wanted is not None and not _agree(field, fact, wanted, depths):
                conflicts.append(f"{field} {_text(fact)} for {_text(wanted)}")
            values[field] = fact if wanted is None else wanted
        if values[field] is None and field not in open_fields:
            open_fields.append(field)
    if family == "swinv2":
        if values["image_size"] is None and not values["absolute_position"]:
            _full_windows(values, open_fields)
        _scale_coordinates(values, weights, given, named, open_fields, where)
    if conflicts:
        whose = f"the model {name}" if named is not None else "what was set"
        raise WeightsError(
            f"{where}: {weights.what}: not the model of the run; got {', '.join(conflicts)} of "
            f"{whose}, expected the same. {_name_another(section, family)}"
        )
    if open_fields:
        prefix = f"--{section}.architecture." if section else "--architecture."
        flags = ", ".join(prefix + field for field in sorted(open_fields))
        raise WeightsError(
            f"{where}: {weights.what}: neither its tensors nor a config.json beside it tell "
            f"everything; got no {', '.join(sorted(open_fields))}, expected every field of a "
            f"{family} model. Set {flags}."
        )
    return whole(values)


def _full_windows(values: dict[str, Any], open_fields: list[str]) -> None:
    """The image on which every stage has a full window, where no tensor depends on the size."""
    window, stages = values["window_size"], len(values["depths"] or ())
    if window is not None and values["patch_size"] is not None:
        values["image_size"] = window * values["patch_size"] * 2 ** max(stages - 1, 0)
    if "image_size" in open_fields:
        open_fields.remove("image_size")


def _scale_coordinates(
    values: dict[str, Any],
    weights: Weights,
    given: Architecture,
    named: FamilyArchitecture | None,
    open_fields: list[str],
    where: str,
) -> None:
    """SwinV2's rule for another window: coordinates are scaled by the window of pre-training."""
    field = "pretrained_window_sizes"
    if getattr(given, field) is not None:
        return
    known = getattr(weights.found, field) or getattr(weights.told, field)
    if known is None:
        if named is not None:
            log.info(
                "%s: nothing in the file tells its windows: it is taken for one of window %d, as "
                "the model has",
                where,
                values["window_size"],
            )
        return
    stages = len(values["depths"] or known)
    values[field] = tuple(known[:stages])
    if field in open_fields:
        open_fields.remove(field)
    window = values["window_size"]
    if window is not None and max(known) != window:
        log.info(
            "%s: window %d in place of %d: coordinates are scaled by the windows of the file, %s",
            where,
            window,
            max(known),
            _text(known),
        )


def _agree(field: str, fact: Any, wanted: Any, depths: tuple[int, ...]) -> bool:
    """Whether weights with the one value make a model with the other."""
    if field == "extra_norm_every":  # Beyond the deepest stage it means none.
        return (
            all(k > max(depths) for k in (fact or math.inf, wanted or math.inf)) or fact == wanted
        )
    if field in ("depths", "num_heads"):  # The first stages of a Swin.
        return tuple(fact[: len(wanted)]) == tuple(wanted)
    if field == "layer_scale":  # Its value is in the weights.
        return bool(fact) == bool(wanted)
    if field == "relative_position":  # What is shared can be copied to every block.
        return fact == wanted or (fact, wanted) == ("shared", "block")
    if field == "shared_position_bias":
        return fact == wanted or (fact and not wanted)
    if isinstance(fact, float):
        return math.isclose(fact, wanted, rel_tol=1e-6)
    return fact == wanted


def _name_another(section: str, family: str) -> str:
    if section != "student":
        flag = "--teacher.model" if section else "--model"
        return f"Set {flag} auto to take the model of the file."
    return f"Name a {family} model by --student.model, or set --student.architecture.*."


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def stated_statistics(section: FrozenModel) -> Statistics | None:
    """Returns the statistics that a (settled) run states; None: those of its named net."""
    if not section.statistics:
        return None
    return Statistics(tuple(section.statistics[:3]), tuple(section.statistics[3:]))

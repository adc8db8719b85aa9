"""Settles the models of a recipe: fills each section with the architecture that its weights show.

Names and shapes of tensors decide most fields. Other fields come from the format, a configuration
next to the file, the named model or the user. A field that none of these gives is an error.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

from fd_large.backbones.family import Family
from fd_large.backbones.published import Settling
from fd_large.backbones.registry import family_of
from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import (
    Architecture,
    by_name,
    field_names,
    filled,
    name_of,
    overrides,
    resolve,
    whole,
)
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.fields import hints_of
from fd_large.recipes.sections import AUTO, RANDOM, FrozenModel, Student
from fd_large.weights.published import PublishedWeights
from fd_large.weights.resolve import Sources, other_model
from fd_large.weights.sidecar import Described

log = logging.getLogger(__name__)

_STATED_BESIDE = (
    'name a folder that "weights convert" has written (--to fd), and add "mean" and "std", three '
    'numbers each, under "fd_large" in its config.json'
)


def settle_model(section: FrozenModel, sources: Sources, *, where: str) -> FrozenModel:
    """Returns the section of a frozen model, completed from its weights.

    Weights on the Hub are downloaded; of files only the headers are read. This function is
    called before any model is built. A section that is already complete is returned unchanged, and
    so is a section without weights.

    Raises:
        WeightsError: If a file cannot be read, has weights of another model than the section names,
            or leaves fields unknown.
        ConfigError: If no model has the resulting fields.
    """
    if section.source in ("", RANDOM):
        return section
    weights = sources.resolve(section.source, where=where)
    if weights.brought:
        return _brought(section, *weights.brought, where)
    if stored := weights.unpublished:
        architecture = filled(section.architecture, overrides(stored.architecture))
        section = replace(section, source=str(stored.path))
        return _whole(section, stored.architecture.family, architecture, stored.statistics)
    named = by_name(section.model)
    if described := weights.described:
        family = described.family.architecture.family
        # Runs of earlier versions name this package's model; now the library's model is taken.
        is_of_library = section.model in (AUTO, family) or (named and named.family == family)
        if is_of_library or not described.read_here:
            return _of_library(section, described, where)
    if section.model != AUTO:
        requested = resolve(section.model, section.architecture)
        if family_of(requested).published is None:  # Its tensors' names and shapes show no model.
            return section
    return _of_published(section, named, weights.published, sources, where)


def _whole(
    section: FrozenModel, model: str, architecture: Architecture, statistics: Statistics | None
) -> FrozenModel:
    """Returns the section with a completely described model, named by its name or its family's.

    The statistics are those that the weights were trained with, or None if unknown; statistics that
    the user set stay.
    """
    return replace(
        section,
        model=model,
        architecture=architecture,
        statistics=section.statistics or _numbers(statistics),
    )


def _brought(section: FrozenModel, family: Family, name: str, where: str) -> FrozenModel:
    """Returns the section for a source such as `timm:NAME`, which provides the model.

    For `timm:NAME=random` the source becomes `random`. The name is the source without its prefix,
    which is that of `family`.
    """
    assert family.scheme is not None
    untrained = family.scheme.untrained(name)
    if untrained is not None:
        section, name = replace(section, source=RANDOM), untrained
    architecture, notes = family.scheme.settle(name, section.architecture, where)
    for note in notes:
        log.info("%s: %s", where, note)
    model = family.architecture.family
    facts = family.facts_of(resolve(model, architecture))
    return _whole(section, model, architecture, facts.statistics if facts else None)


def _of_library(section: FrozenModel, description: Described, where: str) -> FrozenModel:
    """Returns the section for a folder whose config.json describes a library's model.

    Raises: WeightsError: if the user named another model.
    """
    described = resolve(description.family.architecture.family, description.architecture)
    if section.model != AUTO:
        requested = resolve(section.model, section.architecture)
        if (type(requested), requested.own_name) != (type(described), described.own_name):
            raise WeightsError(
                f"{where}: {section.source}: not the model of the run; got {name_of(described)} in "
                f"its config.json, expected {name_of(requested)} (model {section.model}). Set "
                f"{where.removesuffix('.source')}.model auto to take the model of the folder."
            )
    statistics = description.statistics
    if statistics is None and not section.statistics:
        facts = description.family.facts_of(described)
        statistics = facts.statistics if facts else None
        log.warning(
            "%s: the folder of %s does not state its image statistics: those of the published "
            "model are used (%s.statistics)",
            where,
            name_of(described),
            where.removesuffix(".source"),
        )
    architecture = filled(section.architecture, description.architecture)
    return _whole(section, described.family, architecture, statistics)


def _of_published(
    section: FrozenModel,
    named: FamilyArchitecture | None,
    weights: PublishedWeights,
    sources: Sources,
    where: str,
) -> FrozenModel:
    """Returns the section for weights in a published format, whose tensors show the model.

    Args:
        section: The section as the user set it.
        named: The model that the section names; None if it names none or a family alone.
        weights: The weights, with the architecture fields that they show.
        sources: Has the image statistics that an earlier launch determined (`settled`).

    Raises: WeightsError: if the tensors are those of another model, or leave fields unknown.
    """
    flags = where.removeprefix("--").removesuffix(".source") if where.startswith("--") else None
    statistics = (
        section.statistics
        or _numbers(weights.statistics)
        or sources.settled.get(weights.source, ())
    )
    is_guess = not statistics and section.model not in weights.published.facts
    asks = is_guess and not sources.guesses and weights.source not in sources.settled
    architecture = reconcile(
        weights,
        section.architecture,
        named,
        name=section.model,
        where=where,
        section=flags,
        trained_with=weights.trained_with if asks else "",
    )
    if is_guess:
        log.warning(
            "%s: %s: THE IMAGE STATISTICS OF THE WEIGHTS ARE A GUESS, not confirmed by the file "
            "or a configuration next to it: ImageNet's are used, %s%s. To state others, %s",
            where,
            weights.what,
            " ".join(f"{number:g}" for number in _numbers(IMAGENET)),
            f"; published are {weights.trained_with}" if weights.trained_with else "",
            _STATED_BESIDE if flags is None else f"set --{flags}.statistics",
        )
    return replace(
        section,
        model=section.model if named else architecture.family,
        source=weights.source,
        architecture=overrides(architecture, named),
        statistics=tuple(map(float, statistics)),
    )


def settle_student(student: Student, sources: Sources) -> Student:
    """Returns the student's section, completed from the weights of `init`.

    A section without `init` is returned unchanged. If the model's family has no published formats,
    tensors do not show the model, and only `init` changes: for a run it becomes the path of the
    checkpoint that is taken. The errors are those of `settle_model`.
    """
    if not student.init:
        return student
    where, name = "--student.init", student.model
    requested, weights = (
        resolve(name, student.architecture),
        sources.resolve(student.init, where=where),
    )
    is_shown = family_of(requested).published is not None
    stored = weights.unpublished if is_shown else weights.stored
    if stored and stored.architecture.family != requested.family:
        raise other_model(student.init, stored.architecture, requested, where)
    if not is_shown:  # Names and shapes of tensors do not show the model, so the user names it.
        return replace(student, init=str(stored.path)) if stored else student
    named, published = resolve(name), weights.published
    architecture = reconcile(
        published, student.architecture, named, name=name, where=where, section="student"
    )
    return replace(student, init=published.source, architecture=overrides(architecture, named))


def reconcile(
    weights: PublishedWeights,
    user_fields: Architecture,
    named: FamilyArchitecture | None,
    *,
    name: str,
    where: str,
    section: str | None,
    trained_with: str = "",
) -> FamilyArchitecture:
    """Returns the architecture that agrees with the weights, the named model and the user's fields.

    Args:
        weights: Weights in a published format, with the fields that they show.
        user_fields: Fields that the user set, which take precedence over the named model's.
        named: The named model; None takes the model that the weights show.
        name: Name of the named model, for messages.
        section: Section of the recipe that is the prefix of the model's flags; "" if the flags have
            no prefix, None if the command has no such flags.
        trained_with: Image statistics, in words, among which the user has to choose; "" if the user
            need not choose.

    Raises: WeightsError: if the weights are those of another model, or a field is unknown.
    """
    family, published = weights.family.architecture.family, weights.published
    if named is not None and named.family != family:
        raise WeightsError(
            f"{where}: {weights.what}: a model of another family; got {family}, expected "
            f"{named.family} (model {name}). {_name_another(section, family)}"
        )
    values: dict[str, Any] = {"family": family}
    conflicts, depths = [], weights.found.depths or (0,)
    for field in field_names(family):
        user, net = getattr(user_fields, field), named and getattr(named, field)
        shown, stated = getattr(weights.found, field), getattr(weights.stated, field)
        if field in published.ours:
            values[field] = _first(user, net, published.ours[field])
        elif field in published.free:
            values[field] = _first(user, net, shown, stated)
        else:
            fact = shown if shown is not None else stated if user is None else None
            requested = _first(user, net)
            agree = published.agree.get(field, _equal)
            if fact is not None and requested is not None and not agree(fact, requested, depths):
                conflicts.append(f"{field} {_text(fact)} instead of {_text(requested)}")
            values[field] = fact if requested is None else requested
    settling = Settling(filled(weights.found, weights.stated), user_fields, named is not None)
    for note in published.complete(values, settling):
        log.info("%s: %s", where, note)
    if conflicts:
        whose = f"the model {name}" if named is not None else "the fields that are set"
        raise WeightsError(
            f"{where}: {weights.what}: not the model of the run; got "
            f"{', '.join(sorted(conflicts))}, expected the values of {whose}. "
            f"{_name_another(section, family)}"
        )
    unset = {field for field, value in values.items() if value is None}
    unknown = sorted(unset.union(weights.unknown(user_fields)))
    if unknown or trained_with:
        raise _nothing_shows(weights, unknown, where, section, trained_with)
    return whole(values)


def _nothing_shows(
    weights: PublishedWeights, fields: list[str], where: str, section: str | None, trained_with: str
) -> WeightsError:
    """Returns the error for weights that leave `fields` or image statistics unknown.

    `section` and `trained_with` are those of `reconcile`.
    """
    start, remedy = f"--{section}." if section else "--", "Set"
    if section is None:
        remedy = (
            "Convert the weights, and name the folder DIR: python -m fd_large weights convert "
            f"{weights.source} DIR --to fd"
        )
    flags = [f"{start}architecture.{field} {_placeholder(field)}" for field in fields]
    missing = list(fields)
    if trained_with:
        flags.append(f"{start}statistics MEAN MEAN MEAN STD STD STD ({trained_with})")
        missing.append("image statistics")
    return WeightsError(
        f"{where}: {weights.what}: its tensors and config.json do not determine all fields of the "
        f"model; got no {', '.join(missing)}, expected every field of a "
        f"{weights.family.architecture.family} model. {remedy} {' '.join(flags)}"
    )


def _placeholder(field: str) -> str:
    """Returns a placeholder for the value of the architecture field `field` in a flag.

    It is the list of choices, such as "gelu|quick_gelu" or "True|False", for several numbers
    "NUMBERS", otherwise "NUMBER".
    """
    hint = hints_of(Architecture)[field]
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Literal:
            return "|".join(map(str, get_args(part)))
        if part is bool:
            return "True|False"
        if get_origin(part) is tuple:
            return "NUMBERS"
    return "NUMBER"


def stated_statistics(section: FrozenModel) -> Statistics | None:
    """Returns the image statistics in a section that is completed from its weights, or None.

    None means that `section` states none, and that those of the model that it names are used.
    """
    if not section.statistics:
        return None
    return Statistics(tuple(section.statistics[:3]), tuple(section.statistics[3:]))


def _numbers(statistics: Statistics | None) -> tuple[float, ...]:
    return tuple(map(float, (*statistics.mean, *statistics.std))) if statistics else ()


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _equal(fact: Any, requested: Any, depths: tuple[int, ...]) -> bool:
    if isinstance(fact, float):
        return math.isclose(fact, requested, rel_tol=1e-6)
    return fact == requested


def _name_another(section: str | None, family: str) -> str:
    if section is None:
        return "Name the weights alone to take the model of the file."
    if section != "student":
        flag = f"--{section}.model" if section else "--model"
        return f"Set {flag} auto to take the model of the file."
    return f"Name a {family} model by --student.model, or set --student.architecture.*."


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_text, value))
    return f"{value:g}" if isinstance(value, float) else str(value)

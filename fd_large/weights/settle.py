"""Sections of a recipe whose sources are settled: the models have the architecture that files show.

What names and shapes show is a fact; what they cannot show comes from the format, a configuration
beside the file, the named model or the user, and is asked for where nothing shows it.
"""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from typing import Any, Literal, get_args, get_origin

from fd_large.backbones.family import Family
from fd_large.backbones.published import Settling
from fd_large.backbones.registry import family_of, family_of_source
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
from fd_large.weights.opened import Weights
from fd_large.weights.sidecar import Described
from fd_large.weights.source import Sources
from fd_large.weights.stored_models import Stored, other_model

log = logging.getLogger(__name__)

_STATED_BESIDE = (
    'name a folder that "weights convert" has written (--to fd), and add "mean" and "std", three '
    'numbers each, under "fd_large" in its config.json'
)


def settle_model(section: FrozenModel, sources: Sources, *, where: str) -> FrozenModel:
    """Returns the section of a frozen model as its weights show it; reads headers only.

    To be called before anything is built; a settled section is settled again without change.

    Args:
        section: The section as the user set it.
        sources: Opens the weights.
        where: The flag of the source, for messages.

    Raises: WeightsError: if a file cannot be read, does not hold the named model, or leaves fields
        open that nothing determines; ConfigError: if a model cannot be as it is described.
    """
    if brought := family_of_source(section.source):
        family, rest = brought
        assert family.scheme is not None
        untrained = family.scheme.untrained(rest)
        source = section.source if untrained is None else RANDOM
        rest = rest if untrained is None else untrained
        architecture, notes = family.scheme.settle(rest, section.architecture, where)
        for note in notes:
            log.info("%s: %s", where, note)
        model = family.architecture.family
        facts = family.facts_of(resolve(model, architecture))
        statistics = section.statistics or _numbers(facts.statistics if facts else None)
        return replace(
            section, model=model, source=source, architecture=architecture, statistics=statistics
        )
    if section.source in ("", RANDOM):
        return section
    if own := sources.own(section.source, where=where):
        return _of_own(section, own)
    described = sources.described(section.source, where=where)
    # Runs of earlier versions name a model of ours where the library's is taken now.
    is_ours = described and described.read_here and not _is_of(section, described.family)
    if described and not is_ours:
        return _of_library(section, described, where)
    if _tells_nothing(section):
        return section
    # A family alone names no model: its fields are all the user's, or a settled run's.
    by_itself = section.model == AUTO or by_name(section.model) is None
    weights = sources.open(section.source, where=where)
    named = None if by_itself else resolve(section.model)
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
            "%s: %s: THE IMAGE STATISTICS OF THE WEIGHTS ARE A GUESS, which neither the file nor a "
            "configuration beside it confirms: ImageNet's are used, %s%s. To state others, %s",
            where,
            weights.what,
            " ".join(f"{number:g}" for number in _numbers(IMAGENET)),
            f"; published are {weights.trained_with}" if weights.trained_with else "",
            _STATED_BESIDE if flags is None else f"set --{flags}.statistics",
        )
    return replace(
        section,
        model=architecture.family if by_itself else section.model,
        source=weights.source,
        architecture=overrides(architecture, named),
        statistics=tuple(map(float, statistics)),
    )


def _of_own(section: FrozenModel, own: Stored) -> FrozenModel:
    """The section of a model of ours whose family has no published names."""
    return replace(
        section,
        model=own.architecture.family,
        source=str(own.path),
        architecture=filled(section.architecture, overrides(own.architecture)),
        statistics=section.statistics or _numbers(own.statistics),
    )


def _is_of(section: FrozenModel, family: Family) -> bool:
    """Whether a section names a model of a family, or leaves it open."""
    if section.model in (AUTO, family.architecture.family):
        return True
    named = by_name(section.model)
    return named is not None and named.family == family.architecture.family


def _of_library(section: FrozenModel, found: Described, where: str) -> FrozenModel:
    """The section of a library's model, which its folder describes.

    Raises: WeightsError: if the user named another model.
    """
    described = resolve(found.family.architecture.family, found.architecture)
    architecture = filled(section.architecture, found.architecture)
    if section.model != AUTO:
        wanted = resolve(section.model, section.architecture)
        if (type(wanted), wanted.own_name) != (type(described), described.own_name):
            raise WeightsError(
                f"{where}: {section.source}: not the model of the run; its config.json says "
                f"{name_of(described)}, expected {name_of(wanted)} (model {section.model}). Set "
                f"{where.removesuffix('.source')}.model auto to take the model of the folder."
            )
    statistics = found.statistics
    if statistics is None and not section.statistics:
        facts = found.family.facts_of(described)
        statistics = facts.statistics if facts else None
        log.warning(
            "%s: the folder of %s does not state its image statistics: those of the published "
            "model are used (%s.statistics)",
            where,
            name_of(described),
            where.removesuffix(".source"),
        )
    return replace(
        section,
        model=described.family,
        architecture=architecture,
        statistics=section.statistics or _numbers(statistics),
    )


def settle_student(student: Student, sources: Sources) -> Student:
    """Returns the student's section with the model as the weights of `init` allow it.

    Raises: WeightsError, ConfigError: as `settle_model`.
    """
    if not student.init:
        return student
    where, name = "--student.init", student.model
    wanted = resolve(name, student.architecture)
    if family_of(wanted).published is None:
        # Names and shapes do not show its model, which is what the user says.
        ours = sources.ours(student.init, where=where)
        if ours and ours.architecture.family != wanted.family:
            raise other_model(student.init, ours.architecture, wanted, where)
        return replace(student, init=str(ours.path)) if ours else student
    if own := sources.own(student.init, where=where):
        raise other_model(student.init, own.architecture, wanted, where)
    weights, named = sources.open(student.init, where=where), resolve(name)
    architecture = reconcile(
        weights, student.architecture, named, name=name, where=where, section="student"
    )
    return replace(student, init=weights.source, architecture=overrides(architecture, named))


def reconcile(
    weights: Weights,
    given: Architecture,
    named: FamilyArchitecture | None,
    *,
    name: str,
    where: str,
    section: str | None,
    trained_with: str = "",
) -> FamilyArchitecture:
    """Returns the architecture of a model that takes the weights.

    Args:
        weights: Opened.
        given: Fields that the user set, which come first.
        named: The named model; None if the model is what the file shows.
        name: Name of the named model, for messages.
        where: What the user set, for messages.
        section: The section that the flags of the model begin with; "" where they have none, None
            where there are no such flags.
        trained_with: Image statistics among which the user has to choose; "" if nothing is to be
            chosen.

    Raises: WeightsError: if file and model differ, or a field is known to nobody.
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
        user, net = getattr(given, field), named and getattr(named, field)
        shown, stated = getattr(weights.found, field), getattr(weights.stated, field)
        if field in published.ours:
            values[field] = _first(user, net, published.ours[field])
        elif field in published.free:
            values[field] = _first(user, net, shown, stated)
        else:
            fact = shown if shown is not None else stated if user is None else None
            wanted = _first(user, net)
            agree = published.agree.get(field, _equal)
            if fact is not None and wanted is not None and not agree(fact, wanted, depths):
                conflicts.append(f"{field} {_text(fact)} for {_text(wanted)}")
            values[field] = fact if wanted is None else wanted
    settling = Settling(filled(weights.found, weights.stated), given, named is not None)
    for note in published.complete(values, settling):
        log.info("%s: %s", where, note)
    if conflicts:
        whose = f"the model {name}" if named is not None else "what was set"
        raise WeightsError(
            f"{where}: {weights.what}: not the model of the run; got "
            f"{', '.join(sorted(conflicts))} of {whose}, expected the same. "
            f"{_name_another(section, family)}"
        )
    unset = {field for field, value in values.items() if value is None}
    asked = sorted(unset.union(weights.unknown(given)))
    if asked or trained_with:
        start, remedy = f"--{section}." if section else "--", "Set"
        if section is None:
            remedy = (
                f"Name the folder that this writes: python -m fd_large weights convert "
                f"{weights.source} DIR --to fd"
            )
        flags = [f"{start}architecture.{field} {_placeholder(field)}" for field in asked]
        if trained_with:
            flags.append(f"{start}statistics MEAN MEAN MEAN STD STD STD ({trained_with})")
            asked.append("image statistics")
        raise WeightsError(
            f"{where}: {weights.what}: neither its tensors nor a config.json beside it show "
            f"everything; got no {', '.join(asked)}, expected every field of a {family} model. "
            f"{remedy} {' '.join(flags)}"
        )
    return whole(values)


def _placeholder(field: str) -> str:
    """What stands for the value of a field in a flag: "gelu|quick_gelu", "NUMBER"."""
    hint = hints_of(Architecture)[field]
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Literal:
            return "|".join(map(str, get_args(part)))
        if part is bool:
            return "True|False"
        if get_origin(part) is tuple:
            return "NUMBERS"
    return "NUMBER"


def _tells_nothing(section: FrozenModel) -> bool:
    """Whether the named model is of a family whose files have no names that show a model."""
    if section.model == AUTO:
        return False
    return family_of(resolve(section.model, section.architecture)).published is None


def stated_statistics(section: FrozenModel) -> Statistics | None:
    """Returns the statistics that a (settled) section states; None: those of its named model."""
    if not section.statistics:
        return None
    return Statistics(tuple(section.statistics[:3]), tuple(section.statistics[3:]))


def _numbers(statistics: Statistics | None) -> tuple[float, ...]:
    return tuple(map(float, (*statistics.mean, *statistics.std))) if statistics else ()


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _equal(fact: Any, wanted: Any, depths: tuple[int, ...]) -> bool:
    if isinstance(fact, float):
        return math.isclose(fact, wanted, rel_tol=1e-6)
    return fact == wanted


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

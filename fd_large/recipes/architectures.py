"""Table of named models, and the section of a recipe that describes a model. Imports no torch.

The section is the dataclass `Architecture`, which has the fields of all families; unset fields are
None. `Architecture` is made from the families' own dataclasses (`backbones/NAME/architecture.py`),
in which each field is declared and described. `resolve` turns a model's name and a section into the
dataclass of the model's family.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from fd_large import doors
from fd_large.backbones.custom.architecture import CustomArchitecture
from fd_large.backbones.swin.architecture import MODELS as SWIN
from fd_large.backbones.swin.architecture import SwinArchitecture
from fd_large.backbones.swinv2.architecture import MODELS as SWINV2
from fd_large.backbones.swinv2.architecture import SwinV2Architecture
from fd_large.backbones.timm.architecture import MODELS as TIMM
from fd_large.backbones.timm.architecture import TimmArchitecture
from fd_large.backbones.transformers.architecture import TransformersArchitecture
from fd_large.backbones.vit.architecture import MODELS as VIT
from fd_large.backbones.vit.architecture import ViTArchitecture
from fd_large.errors import ConfigError, nearest
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.fields import from_plain

FAMILIES: dict[str, type[FamilyArchitecture]] = {
    family.family: family
    for family in (
        SwinV2Architecture,
        SwinArchitecture,
        ViTArchitecture,
        TimmArchitecture,
        TransformersArchitecture,
        CustomArchitecture,
    )
}
ARCHITECTURES: dict[str, FamilyArchitecture] = {**SWINV2, **SWIN, **VIT, **TIMM}


def field_names(family: str) -> tuple[str, ...]:
    """Returns the names of the fields that models of the backbone family `family` have.

    Raises: ConfigError: if the family does not exist.
    """
    if family not in FAMILIES:
        raise ConfigError(
            f"architecture.family: unknown; got {family!r}, {nearest(family, FAMILIES)}. Use "
            "one of these."
        )
    return tuple(f.name for f in fields(FAMILIES[family]))


def _descriptions(cls: type) -> dict[str, str]:
    """Returns {field: description} for the fields of a dataclass and of its base classes.

    The descriptions are the entries under "Attributes:" in the classes' docstrings. For a field
    that several classes describe, the entry of the most derived class is used.
    """
    descriptions: dict[str, str] = {}
    for base in cls.__mro__:
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")
        for entry in re.split(r"\n {4}(?=\S)", f"\n{section}")[1:]:
            name, _, text = entry.partition(": ")
            descriptions.setdefault(name, " ".join(text.split()))
    return descriptions


def _flat_section(families: Iterable[type[FamilyArchitecture]]) -> type:
    """Makes a dataclass that has the fields of all `families`, each None by default.

    The texts of the families' own docstrings describe the fields.
    """
    types: dict[str, Any] = {"family": Literal[tuple(family.family for family in families)]}
    texts = {"family": "Family of the model, which the name of the model decides."}
    for family in families:
        hints, described = get_type_hints(family), _descriptions(family)
        for f in fields(family):
            definition = hints[f.name], described[f.name]
            known = types.setdefault(f.name, definition[0]), texts.setdefault(f.name, definition[1])
            assert known == definition, f"{family.__name__}.{f.name} differs from another family's"
    attributes = "\n".join(f"    {name}: {text}" for name, text in texts.items())
    return make_dataclass(
        "Architecture",
        [(name, hint | None, field(default=None)) for name, hint in types.items()],
        namespace={
            "__module__": __name__,
            "__doc__": "Fields of a model; None is the named model's own value.\n\n"
            f"Attributes:\n{attributes}",
        },
        frozen=True,
        kw_only=True,
    )


if TYPE_CHECKING:

    @dataclass(frozen=True)
    class Architecture:
        """Section of a model, for type checkers; its fields are made when the program runs."""

        def __init__(self, **values: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

else:
    Architecture = _flat_section(tuple(FAMILIES.values()))


def by_name(name: str) -> FamilyArchitecture | None:
    """Returns the model that `name` names, or None for an unknown name.

    A name is known if it is in the table or begins with a family's prefix, as in `timm:NAME`.
    Whether the library or the file behind a prefix has the model is checked when the model is
    built.
    """
    for family in FAMILIES.values():
        if family.prefix and name.startswith(family.prefix):
            return family.named(name.removeprefix(family.prefix))
    return ARCHITECTURES.get(name)


def split_model(source: str) -> tuple[str, str]:
    """Splits MODEL=SOURCE into the name of the model and the source of weights.

    If there is no known model before the first "=", the model is "", and the source is the whole
    `source`, since a path may contain "=".
    """
    named, sign, weights = source.partition("=")
    if sign and by_name(named):
        return named, weights
    return "", source


def name_of(architecture: FamilyArchitecture) -> str:
    """Returns the name of a model.

    This is the name in the table of models; a model that differs from one in the table by the
    image size alone has the same name. For a model that is not in the table, it is the name with
    the family's prefix (`timm:NAME`), or the family's name if the family has no prefix.
    """
    for name, model in ARCHITECTURES.items():
        same = name not in FAMILIES and type(model) is type(architecture)
        if same and _values_but_size(model) == _values_but_size(architecture):
            return name
    return architecture.own_name or architecture.family


def full_name(section: Mapping[str, Any]) -> str:
    """Returns the name of the model that a section of recipe.json describes.

    If the model was found from its weights, recipe.json has the family and all fields. The name is
    then that of `name_of`, or the family's if the section is invalid.
    """
    model: str = section["model"]
    if model not in FAMILIES:
        return model
    described = model_of(section)
    return name_of(described) if described else model


def model_of(section: Mapping[str, Any]) -> FamilyArchitecture | None:
    """Returns the model that a section of recipe.json describes, or None for an invalid section.

    A section may be invalid if another version of the package wrote it.
    """
    try:
        architecture = from_plain(Architecture, section.get("architecture", {}), "architecture.")
        return resolve(section["model"], architecture)
    except ConfigError:
        return None


def changed_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    """Returns {field: value} in which a model differs from the named model, `full_name(section)`.

    The result is {} if the section of recipe.json is not valid, or no model has this name.
    """
    model, named = model_of(section), by_name(full_name(section))
    return set_fields(overrides(model, named)) if model and named else {}


def changed_words(section: Mapping[str, Any]) -> str:
    """Returns `changed_fields` as text, such as "image_size 448, depths 2 2 6 2", or ""."""
    words = {
        name: " ".join(map(str, value)) if isinstance(value, tuple) else value
        for name, value in changed_fields(section).items()
    }
    return ", ".join(f"{name} {value}" for name, value in words.items())


def image_side_of(section: Mapping[str, Any], image_size: int) -> int:
    """Returns the side of a teacher's images in pixels, or 0 if the section does not tell.

    Args:
        section: The teacher's section of recipe.json.
        image_size: Side of the student's images in pixels.
    """
    side = section.get("teacher_image_size")
    if not isinstance(side, int):  # The size follows from the two grids, or from another section.
        return 0
    model = model_of(section)
    return side or (model.fixed_image_size if model else 0) or image_size


def _values_but_size(architecture: FamilyArchitecture) -> dict[str, Any]:
    return {**architecture.values(), "image_size": None}


def brings_model(source: str) -> bool:
    """Whether `source`, a source of weights, also names the model, as `timm:NAME` does."""
    return any(f.prefix and source.startswith(f.prefix) for f in FAMILIES.values())


def resolve(name: str, overrides: Architecture | None = None) -> FamilyArchitecture:
    """Returns a model as the dataclass of its family.

    Args:
        name: Name in the table, name with a family's prefix (`timm:NAME`), or name of a family.
        overrides: Fields with other values than the named model's; for a family, all fields.

    Raises:
        ConfigError: If the name is unknown, or a field does not belong to the family, is missing or
            has an invalid value.
    """
    values = set_fields(overrides or Architecture())
    if base := by_name(name):
        family = values.pop("family", base.family)
        if family != base.family:
            raise ConfigError(
                f"architecture.family: decided by the model {name}; got {family!r}, expected "
                f"{base.family!r}. Name another model."
            )
        _refuse_foreign(values, base.family, name)
        return base.overridden(values)
    if name in doors.installed("backbones"):
        return CustomArchitecture(function=name).overridden(values)
    if name not in FAMILIES:
        raise ConfigError(
            f"model: no such model; got {name!r}, {nearest(name, ARCHITECTURES)}. Use a listed "
            f"name, timm:{name} if it is a model of timm, or {doors.FORMS}."
        )
    values["family"] = name
    return whole(values)


def whole(values: dict[str, Any]) -> FamilyArchitecture:
    """Returns the model with these values of all its fields; `family` is the family's name.

    Raises: ConfigError: if a field is missing, belongs to another family, or has an invalid value.
    """
    model_fields = dict(values)
    family = model_fields.pop("family")
    field_names(family)  # Refuses an unknown family.
    needed = {f.name for f in fields(FAMILIES[family]) if f.default is MISSING}
    missing = sorted(needed - model_fields.keys())
    if missing:
        raise ConfigError(
            f"model: {family} is a family, not a model; got no values for {', '.join(missing)}, "
            "expected a value of every field. Set these fields by --teacher.architecture or "
            "--student.architecture, or name a model."
        )
    _refuse_foreign(model_fields, family, family)
    return FAMILIES[family](**model_fields)


def set_fields(section: Architecture) -> dict[str, Any]:
    """Returns {field: value} for the fields of `section` that are set, which means not None."""
    return {name: value for name, value in asdict(section).items() if value is not None}


def filled(first: Architecture, second: Architecture) -> Architecture:
    """Returns a copy of `first`, in which each unset field (None) has the value of `second`."""
    return Architecture(**set_fields(second) | set_fields(first))


def overrides(
    architecture: FamilyArchitecture, named: FamilyArchitecture | None = None
) -> Architecture:
    """Returns a section with the fields of `architecture` that differ from the model `named`.

    Without `named`, all fields are set.
    """
    values = architecture.values()
    known = {} if named is None else named.values()
    return Architecture(**{k: v for k, v in values.items() if k not in known or v != known[k]})


def _refuse_foreign(values: dict[str, Any], family: str, name: str) -> None:
    known = field_names(family)
    for field_name, value in values.items():
        if field_name not in known:
            raise ConfigError(
                f"architecture.{field_name}: {name} is a {family} model without that option; "
                f"got {value!r}, {nearest(field_name, known)}. Leave the field out."
            )

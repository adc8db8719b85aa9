"""A model that a user named in the place of the student of a recipe."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from fd_large.engine.student import OWN_FIELDS, as_student, refuse_decided
from fd_large.recipes.architectures import resolve
from fd_large.recipes.sections import FrozenModel, Student


def named_student(
    named: FrozenModel,
    base: Student,
    *,
    image_size: int,
    trained_as: Student | None,
    fields: Collection[str],
) -> Student:
    """Returns the section of a student that starts as a named model.

    Every block gets its own copy of a position bias that blocks share.

    Args:
        named: The model and its weights, settled.
        base: The student of the recipe; its drop path stays.
        image_size: Side of the model's images, in pixels.
        trained_as: The student of the run that trained the model, which decides the other fields;
            None: it is not a run's student.
        fields: Fields of the student that the user set in `base`.

    Raises: ConfigError: for a field that the named model decides.
    """
    refuse_decided(fields, OWN_FIELDS)
    architecture = resolve(named.model, named.architecture).with_own_position_biases()
    if architecture.resizes_positions:
        architecture = architecture.at(image_size)
    own = {name: getattr(base, name) for name in {"drop_path_rate", *fields}}
    section = replace(trained_as or Student(model=named.model), **own)
    return as_student(named, architecture, section, trained_as=trained_as)

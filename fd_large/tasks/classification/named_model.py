"""A model that a user named in the place of the student of a recipe."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from fd_large.errors import ConfigError
from fd_large.recipes.architectures import by_name, overrides, resolve
from fd_large.recipes.sections import RANDOM, FrozenModel, Student

# Fields of the section student that a user sets for named models; the others come with them.
OWN_FIELDS = (
    "drop_path_rate",
    "residual_dtype",
    "attention_memory",
    "activation_checkpointing",
    "checkpoint_every",
)


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
    if mistakes := [name for name in fields if name not in OWN_FIELDS]:
        raise ConfigError(
            "\n".join(
                f"--student.{name}: the named models decide it; got a value of your own, expected "
                f"of student.* only {', '.join(OWN_FIELDS)}. Leave it out, or train: "
                "docs/evaluation.md."
                for name in mistakes
            )
        )
    architecture = resolve(named.model, named.architecture).with_own_position_biases()
    if architecture.resizes_positions:
        architecture = architecture.at(image_size)
    model = trained_as.model if trained_as else named.model
    if by_name(model) is None:
        model = architecture.example
    is_random = named.source == RANDOM
    return replace(
        trained_as or Student(model=model),
        model=model,
        architecture=overrides(architecture, resolve(model)),
        init="" if is_random else named.source,
        init_allow=() if is_random else named.allow,
        **{name: getattr(base, name) for name in {"drop_path_rate", *fields}},
    )

"""A model that a user named as the student of a fine-tuning recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fd_large.engine.find_model import NamedModel
from fd_large.engine.frozen import RANDOM
from fd_large.errors import ConfigError
from fd_large.recipes.architectures import FAMILIES, by_name, overrides, resolve
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.run import Run
from fd_large.recipes.sections import Student
from fd_large.tasks.finetuning.section import KIND

# Fields of the section student that a user sets for named models; the others come with them.
OWN_FIELDS = (
    "drop_path_rate",
    "residual_dtype",
    "attention_memory",
    "activation_checkpointing",
    "checkpoint_every",
)


def recipe_name(named: NamedModel) -> str:
    """The recipe whose settings a model takes where the user names none.

    Raises: ConfigError: if the model cannot be trained here.
    """
    architecture = _architecture(named)
    if not architecture.can_train:
        raise ConfigError(
            f"evaluate: {named.source}: this family's models are not fine-tuned; got "
            f"{architecture.family}, expected a model of "
            f"{', '.join(n for n, family in FAMILIES.items() if family.can_train)}. Set --task knn "
            "or linear."
        )
    if architecture.is_hierarchical:
        return "finetune_esvit_swin_base"
    large = getattr(architecture, "embed_dim", 0) >= 1024
    return "finetune_clip_vit_large" if large else "finetune_clip_vit_base"


def recipe_of(named: NamedModel, base: Run, own_fields: Sequence[str] = ()) -> Run:
    """A fine-tuning recipe with a named model in the student's place.

    Every block gets its own copy of a position bias that blocks share.

    Args:
        named: The model.
        base: A recipe of the task finetune; its drop path stays.
        own_fields: Those of `OWN_FIELDS` that the base's student decides as well; in the others the
            student of a run is trained as the run trained it.

    Raises: ConfigError: if the recipe is of another task.
    """
    if base.task.name != KIND.name:
        raise ConfigError(
            f"--recipe: not one of fine-tuning; got {base.name}, expected a finetune_... one. See "
            "python -m fd_large recipes."
        )
    architecture = _architecture(named).with_own_position_biases()
    if architecture.resizes_positions:
        architecture = architecture.at(named.image_size)
    started = named.trained_by.student if named.trained_by else Student(model="swinv2_tiny")
    model = started.model if named.trained_by else named.section.model
    if by_name(model) is None:
        model = architecture.example
    is_random = named.section.source == RANDOM
    student = replace(
        started,
        model=model,
        architecture=overrides(architecture, resolve(model)),
        init="" if is_random else named.section.source,
        init_allow=() if is_random else named.section.allow,
        **{name: getattr(base.student, name) for name in {"drop_path_rate", *own_fields}},
    )
    finetune = base.task.finetune
    if not finetune.statistics and not is_random:
        finetune = replace(finetune, statistics=named.section.statistics)
    return replace(
        base,
        student=student,
        task=replace(base.task, finetune=finetune),
        data=replace(base.data, image_size=named.image_size),
    )


def _architecture(named: NamedModel) -> FamilyArchitecture:
    return resolve(named.section.model, named.section.architecture)

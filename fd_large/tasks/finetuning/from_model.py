"""A model that a user named as the student of a fine-tuning recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

from fd_large.engine.frozen import RANDOM, Named
from fd_large.errors import ConfigError
from fd_large.recipes.architectures import ARCHITECTURES, Architecture, resolve
from fd_large.recipes.run import Run
from fd_large.recipes.sections import Student

# A model of the table of each family that can be trained, and the recipe whose settings fit it.
FAMILIES = {
    "vit": ("vit_base_patch16", "finetune_clip_vit_base"),
    "swinv2": ("swinv2_base", "finetune_esvit_swin_base"),
    "swin": ("swin_base_esvit", "finetune_esvit_swin_base"),
}

# Fields of the section student that a user sets for models that are named; the others come with them.
OWN_FIELDS = (
    "drop_path_rate",
    "residual_dtype",
    "attention_memory",
    "activation_checkpointing",
    "checkpoint_every",
)


def recipe_name(named: Named) -> str:
    """The recipe whose settings a model takes where the user names none.

    Raises: ConfigError: if the model cannot be trained here.
    """
    architecture = _architecture(named)
    if architecture.family not in FAMILIES:
        raise ConfigError(
            f"evaluate: {named.source}: models of timm, or of one's own, are not fine-tuned; got "
            f"{architecture.family}, expected a model of the families {', '.join(FAMILIES)}. Set "
            "--task knn or linear."
        )
    if architecture.family == "vit" and architecture.embed_dim >= 1024:
        return "finetune_clip_vit_large"
    return FAMILIES[architecture.family][1]


def recipe_of(named: Named, base: Run, own_fields: Sequence[str] = ()) -> Run:
    """A fine-tuning recipe with a named model in the student's place.

    Every block gets its own copy of a position bias that blocks share.

    Args:
        named: The model.
        base: A recipe of the task finetune; its drop path stays.
        own_fields: Of `OWN_FIELDS`, those in which its student's values stay as well; else a run's
            student is trained as the run trained it.
    """
    architecture = _architecture(named)
    own = {
        "image_size": named.image_size if architecture.family == "vit" else None,
        "relative_position": "block" if architecture.relative_position == "shared" else None,
        "shared_position_bias": False if architecture.shared_position_bias else None,
    }
    architecture = replace(architecture, **{k: v for k, v in own.items() if v is not None})
    started = named.trained_by.student if named.trained_by else Student(model="swinv2_tiny")
    model = started.model if named.trained_by else named.section.model
    if model not in ARCHITECTURES:
        model = FAMILIES[architecture.family][0]
    table, whole = resolve(model), asdict(architecture)
    differs = {k: v for k, v in whole.items() if v != getattr(table, k)}
    is_random = named.section.source == RANDOM
    student = replace(
        started,
        model=model,
        architecture=Architecture(**differs),
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


def _architecture(named: Named) -> Architecture:
    return resolve(named.section.model, named.section.architecture)

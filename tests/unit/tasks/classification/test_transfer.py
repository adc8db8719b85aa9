"""A named model in the place of a recipe's student."""

from __future__ import annotations

import pytest

from fd_large.engine.find_model import find_model
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.fields import override
from fd_large.tasks.jobs import job_of, transfer_of

TINY = "vit_base_patch16=random"
BASE = registry.get("finetune_clip_vit_base")


def started(source, base=BASE, fields=()):
    named = find_model(source, job_of)
    return transfer_of("finetune").starting_from(
        base, named.section, image_size=named.image_size, trained_as=None, fields=fields
    )


def test_the_recipe_stays_and_the_model_is_the_named_one():
    run = started(TINY)
    assert run.student.init == ""
    assert run.student_architecture().relative_position == "block"
    assert run.student.drop_path_rate == BASE.student.drop_path_rate == 0.3
    assert run.optim == BASE.optim
    assert started("swinv2_tiny=random").student.model == "swinv2_tiny"
    assert started(TINY, override(BASE, {"task.finetune.mixup": 0.0})).task.finetune.mixup == 0


def test_only_given_fields_of_the_recipes_student_stay():
    changed = {"student.residual_dtype": "compute", "student.activation_checkpointing": "every"}
    student = started(TINY, override(BASE, changed), ["activation_checkpointing"]).student
    assert (student.activation_checkpointing, student.residual_dtype) == ("every", "float32")
    with pytest.raises(ConfigError, match=r"--student\.size_rule"):
        started(TINY, fields=["size_rule"])

"""A named model in the place of a fine-tuning recipe's student."""

from __future__ import annotations

import pytest

from fd_large.engine.find_model import find_model
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.fields import override
from fd_large.tasks.finetuning.named_model import recipe_name
from fd_large.tasks.jobs import job_of

TINY = "vit_base_patch16=random"
BASE = registry.get("finetune_clip_vit_base")


def started(source, base=BASE, fields=()):
    named = find_model(source, job_of)
    return job_of(base).starting_from(
        named.section, image_size=named.image_size, trained_as=None, fields=fields
    )


@pytest.mark.parametrize(
    ("source", "run_recipe", "recipe"),
    [
        # Without a run, random weights and weights of their own.
        (TINY, "", "finetune_clip_vit_base"),
        ("vit_large_patch14=random", "", "finetune_clip_vit_large"),
        (TINY, None, "finetune_clip_vit_base_plain"),
        ("vit_large_patch14=random", None, "finetune_clip_vit_large_plain"),
        ("swinv2_tiny=random", None, "finetune_esvit_swin_base"),
        # Students: the recipe of what distilled them, where one is published.
        (TINY, "fd_dino_vit_base", "finetune_dino_vit_base"),
        (TINY, "fd_clip_vit_base_100ep", "finetune_clip_vit_base_100ep"),
        (TINY, "finetune_deit_vit_base", "finetune_deit_vit_base"),
        (TINY, "my_own", "finetune_clip_vit_base"),
        ("swinv2_tiny=random", "quickstart", "finetune_esvit_swin_base"),
        ("swinv2_tiny=random", "coco_mask_rcnn_swinv2_tiny", "finetune_esvit_swin_base"),
    ],
)
def test_each_model_has_a_recipe(source, run_recipe, recipe):
    architecture = find_model(source, job_of).architecture
    assert recipe_name(architecture, run_recipe=run_recipe) == recipe


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

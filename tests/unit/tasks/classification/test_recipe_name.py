"""Which recipe a model is fine-tuned by."""

from __future__ import annotations

import pytest

from fd_large.engine.find_model import find_model
from fd_large.tasks.classification.recipe_name import recipe_name
from fd_large.tasks.jobs import job_of

TINY = "vit_base_patch16=random"


@pytest.mark.parametrize(
    ("source", "run_recipe", "recipe"),
    [
        # Without a run, random weights and weights of their own.
        (TINY, "", "finetune_clip_vit_base"),
        ("vit_large_patch14=random", "", "finetune_clip_vit_large"),
        (TINY, None, "finetune_clip_vit_base_plain"),
        ("vit_large_patch14=random", None, "finetune_clip_vit_large_plain"),
        ("swinv2_tiny=random", None, "finetune_esvit_swin_base"),
        ("swinv2_large=random", None, "finetune_swinv2_large"),
        # Students: the recipe of what distilled them, where one is published.
        (TINY, "fd_dino_vit_base", "finetune_dino_vit_base"),
        (TINY, "fd_clip_vit_base_100ep", "finetune_clip_vit_base_100ep"),
        (TINY, "finetune_deit_vit_base", "finetune_deit_vit_base"),
        ("swinv2_tiny=random", "fd_swinv2_base", "finetune_swinv2_base"),
        ("swinv2_giant=random", "fd_swinv2g", "finetune_swinv2_giant"),
        (TINY, "my_own", "finetune_clip_vit_base"),
        ("swinv2_tiny=random", "quickstart", "finetune_esvit_swin_base"),
        ("swinv2_tiny=random", "coco_mask_rcnn_swinv2_tiny", "finetune_esvit_swin_base"),
    ],
)
def test_each_model_has_a_recipe(source, run_recipe, recipe):
    architecture = find_model(source, job_of).architecture
    assert recipe_name(architecture, run_recipe=run_recipe) == recipe

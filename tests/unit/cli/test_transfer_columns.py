"""The columns of `transfer`: which recipe a model takes, and that figures fit scores."""

from __future__ import annotations

import pytest

from fd_large.cli.transfer_columns import COLUMNS
from fd_large.recipes import registry
from fd_large.recipes.architectures import resolve


@pytest.mark.parametrize(
    ("model", "ade20k", "coco", "nyuv2"),
    [
        ("vit_base_patch16", "vit_base", "vit_base", "vit_base"),
        ("clip_vit_large_patch14", "vit_large", "vit_base", "vit_base"),
        ("swinv2_tiny", "swinv2_base", "swinv2_tiny", "swinv2_base"),
        ("swinv2_large", "swinv2_base", "swinv2_base", "swinv2_large"),
        ("swinv2_giant", "swinv2_giant", "swinv2_giant", "swinv2_giant"),
        ("swin_base_esvit", "swinv2_base", "swinv2_base", "swinv2_base"),
        ("timm:resnet50", "vit_base", "vit_base", "vit_base"),
    ],
)
def test_the_recipe_of_the_nearest_model_is_taken(model, ade20k, coco, nyuv2):
    found = {name: one.recipe(resolve(model), None) for name, one in COLUMNS.items()}
    assert found["linear"] == "linear_probe"
    assert found["ade20k"] == f"ade20k_upernet_{ade20k}"
    assert found["coco"] == f"coco_mask_rcnn_{coco}"
    assert found["nyuv2"] == f"nyuv2_{nyuv2}"


@pytest.mark.parametrize("column", COLUMNS.values(), ids=lambda column: column.name)
def test_every_published_figure_has_a_score_and_a_recipe(column):
    for run, paper in column.published.items():
        assert registry.get(run).task.name == "distillation"
        assert len(paper.student) == len(paper.teacher) == len(column.scores)
        assert not paper.recipe or paper.recipe == column.recipe(
            registry.get(run).student_architecture(), run
        )

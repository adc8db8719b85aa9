"""The columns of `transfer`: which recipe a model takes, and that figures fit scores."""

from __future__ import annotations

import pytest
import torch

from fd_large.backbones.registry import parameter_shapes
from fd_large.engine.find_model import find_model
from fd_large.engine.job import trained_at
from fd_large.engine.student import make_student
from fd_large.evaluation.trainings import started_from
from fd_large.evaluation.transfer.columns import COLUMNS
from fd_large.recipes import registry
from fd_large.recipes.architectures import resolve
from fd_large.tasks.jobs import job_of


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


@pytest.mark.parametrize("model", ["swin_base_esvit", "vit_large_patch14", "swinv2_base"])
def test_every_column_s_model_can_be_built(model):
    named = find_model(f"{model}=random", job_of)
    for column in COLUMNS.values():
        run = started_from(named, registry.get(column.recipe(named.architecture, "")), {})
        with torch.device("meta"):
            if column.data == "imagenet":  # The head needs the images' classes.
                make_student(run.student, image_size=run.data.image_size)
            else:
                job_of(run).make_task()
        # What its weights are fitted to.
        assert parameter_shapes(trained_at(run))
        if model == "swin_base_esvit":
            assert run.student_architecture().window_size == 14, "those of its position tables"
        if run.student.model == "vit_large_patch14" and column.name != "coco":
            assert run.data.image_size % 14 == 0, column.name


def test_a_crop_that_the_user_set_stays():
    base, named = registry.get("nyuv2_vit_base"), find_model("vit_large_patch14=random", job_of)
    sides = [
        started_from(named, base, fields).data.image_size
        for fields in ({}, {"data.image_size": 480})
    ]
    assert sides == [490, 480]

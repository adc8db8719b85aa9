"""A named model in the place of a recipe's student."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fd_large.engine.find_model import find_model
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.recipes.fields import override
from fd_large.recipes.run import Run
from fd_large.tasks.jobs import job_of, transfer_of


def started(recipe: str, model: str, **fields: object) -> Run:
    """The recipe with a named model of random weights in the student's place."""
    changes = {f"student.{name.replace('__', '.')}": value for name, value in fields.items()}
    named = find_model(f"{model}=random", job_of)
    run = override(registry.get(recipe), changes)
    return transfer_of(run.task.name).starting_from(
        run,
        named.section,
        image_size=named.image_size,
        trained_as=None,
        fields=[name.removeprefix("student.") for name in changes],
    )


def test_a_recipe_starts_from_a_named_model_with_a_window_of_its_own():
    base = registry.get("nyuv2_swinv2_base")
    run = started(base.name, "swinv2_large")
    own, named = run.student_architecture(), resolve("swinv2_large")
    assert (own.embed_dim, own.window_size) == (named.embed_dim, 30)
    # Trained in windows of 14; the last map of 224 pixels has 7 x 7 tokens.
    assert own.pretrained_window_sizes == (14, 14, 14, 7)
    # As large a window on larger maps is another one in the last stage.
    trained = replace(named, image_size=256, window_size=16)
    assert trained.with_window(16).pretrained_window_sizes == (16, 16, 16, 8)
    assert replace(run, student=base.student) == base
    assert replace(run.student, model="", architecture=Architecture()) == replace(
        base.student, model="", architecture=Architecture()
    )


def test_blocks_share_positions_where_those_of_the_recipes_student_do():
    for recipe, position in (
        ("coco_mask_rcnn_vit_base", "shared"),
        ("ade20k_upernet_vit_base", "block"),
    ):
        run = started(recipe, "vit_large_patch14")
        assert run.student_architecture().relative_position == position
        assert run.student.drop_path_rate == registry.get(recipe).student.drop_path_rate


def test_what_the_named_model_decides_cannot_be_set():
    recipe = "ade20k_upernet_swinv2_base"
    assert started(recipe, "swinv2_tiny", size_rule="pad", architecture__window_size=8)
    for name in ("init", "architecture__mlp_ratio"):
        value = 2.0 if "ratio" in name else "x"
        with pytest.raises(ConfigError, match=rf"--student\.{name.replace('__', '.')}: "):
            started(recipe, "swinv2_tiny", **{name: value})


def test_a_task_that_begins_from_no_named_model_is_refused_in_a_sentence():
    with pytest.raises(ConfigError, match=r"^transfer: .*; got distillation, expected .*finetune"):
        transfer_of("distillation")

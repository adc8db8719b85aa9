"""A model that a user names, as the student of a fine-tuning recipe."""

from __future__ import annotations

from fd_large.engine.find_model import find_model
from fd_large.recipes import registry
from fd_large.recipes.fields import override
from fd_large.tasks.finetuning.from_model import recipe_name, recipe_of
from fd_large.tasks.jobs import job_of

TINY = "vit_base_patch16=random"


def test_a_named_net_becomes_a_fine_tuning_recipe():
    named = find_model(TINY, job_of)
    assert recipe_name(named) == "finetune_clip_vit_base"
    base = registry.get("finetune_clip_vit_base")
    run = recipe_of(named, base)
    assert run.student.init == ""
    assert run.student_architecture().relative_position == "block"
    assert run.student.drop_path_rate == base.student.drop_path_rate == 0.3
    assert run.optim == base.optim
    large = find_model("vit_large_patch14=random", job_of)
    assert recipe_name(large) == "finetune_clip_vit_large"
    swin = find_model("swinv2_tiny=random", job_of)
    assert recipe_of(swin, registry.get(recipe_name(swin))).student.model == "swinv2_tiny"
    fields = {
        "student.residual_dtype": "compute",
        "student.activation_checkpointing": "every",
    }
    student = recipe_of(named, override(base, fields), ["activation_checkpointing"]).student
    assert (student.activation_checkpointing, student.residual_dtype) == ("every", "float32")
    unmixed = override(base, {"task.finetune.mixup": 0.0})
    assert recipe_of(named, unmixed).task.finetune.mixup == 0

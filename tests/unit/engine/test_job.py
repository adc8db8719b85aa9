"""What a job does where its task says nothing of its own."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.tasks.jobs import job_of
from fd_large.tasks.registry import TASKS


@pytest.mark.parametrize("name", sorted(registry.RECIPES))
def test_every_recipe_has_a_job_of_its_task(name):
    run = registry.get(name)
    job = type(job_of(run))
    assert f"{job.__module__}.{job.__name__}" == f"fd_large.tasks.{TASKS[run.task.name].job}"


VALUES = {
    "data.color_jitter": 0.4,
    "data.grayscale_probability": 0.2,
    "data.min_crop_scale": 0.5,
    "eval.views": 8,
    "eval.knn_root": "somewhere",
}


@pytest.mark.parametrize(
    "name", ["coco_mask_rcnn_swinv2_tiny", "finetune_clip_vit_base", "fd_swinv2g"]
)
def test_a_field_that_a_task_ignores_is_refused(name):
    run = registry.get(name)
    ignored = job_of(run).ignored_fields
    refused = VALUES.keys() & set(ignored)
    assert bool(refused) == (run.task.name != "distillation")
    for where in refused:
        section, _, field = where.partition(".")
        changed = replace(getattr(run, section), **{field: VALUES[where]})
        with pytest.raises(ConfigError, match=rf"{re.escape(where)}: unused"):
            job_of(replace(run, **{section: changed})).check()

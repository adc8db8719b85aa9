"""What a job does where its task says nothing of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fd_large.engine.job import Job
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.tasks.jobs import job_of


def test_samples_that_cannot_be_staged_are_refused_and_not_forgotten():
    run = registry.get("coco_mask_rcnn_swinv2_tiny")
    job = Job(replace(run, data=replace(run.data, stage_to="/disk")))
    with pytest.raises(ConfigError, match=r"data\.stage_to: .*'/disk' for the task detection"):
        job.stage([])
    assert Job(run).stage([]) == []


@pytest.mark.parametrize("name", sorted(registry.RECIPES))
def test_every_recipe_has_a_job_of_its_task(name):
    run = registry.get(name)
    names = {"distillation": "DistillationJob", "finetune": "FineTuningJob"}
    assert type(job_of(run)).__name__ == names.get(run.task.name, "DetectionJob")

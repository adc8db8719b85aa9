"""The linear probe as a job, without an engine: what is refused, whose layer a checkpoint holds."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from labelled_folder import labelled_folder

from fd_large.engine.counting.count import count, step_flops
from fd_large.engine.find_model import find_model
from fd_large.errors import CheckpointError, ConfigError
from fd_large.kernels.choose import Device
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.tasks.jobs import job_of, transfer_of
from fd_large.tasks.linear.job import LinearProbeJob

TINY = Architecture(embed_dim=16, depths=(1,), num_heads=(2,), patch_size=8)


@pytest.fixture
def run(tmp_path):
    run = registry.get("linear_probe")
    return replace(
        run,
        student=replace(run.student, architecture=TINY),
        data=replace(run.data, root=str(labelled_folder(tmp_path)), image_size=16, workers=0),
        batch=replace(run.batch, global_batch_size=8),
    )


def test_groups_have_to_divide_the_global_batch(run):
    LinearProbeJob(run).check()
    # Fewer images than a group are one.
    assert LinearProbeJob(run).make_task()._norm_batch == 8
    task = replace(run.task, linear=replace(run.task.linear, norm_batch=3))
    with pytest.raises(ConfigError, match=r"task\.linear\.norm_batch: .*got 3"):
        LinearProbeJob(replace(run, task=task)).check()


def counted_at(job, micro_batch_size):
    """The counts of a micro batch on a card, without checkpoints."""
    (counts,) = count(
        job,
        Device((9, 0)),
        bfloat16=True,
        frozen_bfloat16=True,
        checkpointing=[False],
        micro_batch_size=micro_batch_size,
    ).values()
    return counts


def test_parts_of_groups_are_counted_as_what_they_load_and_said(run, caplog):
    job = LinearProbeJob(run)
    part, whole = (step_flops(job, size, checkpointing=False).model for size in (1, 8))
    # The layer alone is computed for one image: forward and the gradient of its weight.
    assert whole - part == 7 * 2 * (2 * 16 * 1000)
    counts = counted_at(job, 8)
    assert counts.step_flops(8).model == whole
    (hook,) = job.hooks()
    for size, said in ((16, False), (4, True)):
        hook.on_start(SimpleNamespace(micro_batch_size=size))
        assert ("got 4, so that each micro batch loads" in caplog.text) == said


def test_a_plan_counts_a_group_whose_images_are_all_its_own(run):
    batch = replace(run.batch, global_batch_size=16)
    task = replace(run.task, linear=replace(run.task.linear, norm_batch=4))
    run = replace(run, batch=batch, task=task)
    job = LinearProbeJob(run)
    alone = step_flops(job, 4, checkpointing=False).frozen / 4
    for asked, images in (("auto", 4), (8, 8)):
        counts = counted_at(job, asked)
        assert counts.images == images
        assert counts.flops_per_image("inference") == alone


def test_training_learns_from_bfloat16_and_tests_from_float32(run):
    job = LinearProbeJob(run)
    job.build(bfloat16=True, node_size=1, persistence_threshold=0)
    frozen = job.make_task()._frozen[0]
    assert {p.dtype for p in frozen.learning.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in frozen.tested.parameters()} == {torch.float32}
    _, (counted,) = job.models_on_shapes()
    assert counted is not frozen.learning
    assert not any(p.requires_grad for p in counted.parameters())


def test_a_checkpoint_is_of_one_frozen_model(run):
    job, other = (
        LinearProbeJob(replace(run, runtime=replace(run.runtime, seed=seed))) for seed in (0, 1)
    )
    for one in (job, other):
        one.build(bfloat16=False, node_size=1, persistence_threshold=0)
    job.check_stored(job.facts())
    with pytest.raises(CheckpointError, match=r"student\.init: not the model"):
        job.check_stored(other.facts())
    with pytest.raises(CheckpointError, match="trains no model"):
        job.stored_student()


def test_a_named_model_is_probed_by_the_one_recipe(run):
    named = find_model("vit_base_patch16=random", job_of)
    transfer = transfer_of("linear")
    assert transfer.recipe_for(named.architecture, run_recipe=None) == "linear_probe"
    started = transfer.starting_from(run, named.section, image_size=224, trained_as=None, fields=())
    assert (started.student.model, started.data.image_size) == ("vit_base_patch16", 224)

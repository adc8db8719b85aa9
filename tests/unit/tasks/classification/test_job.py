"""Both heads as jobs, without an engine: what is refused, counted in a test, and stored."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_runs
import torch
from labelled_folder import labelled_folder
from loading import close
from stored_run import store_tensors

from fd_large.backbones.statistics import OPENAI_CLIP
from fd_large.cli.export import export
from fd_large.data.centre_crops import NO_LABEL
from fd_large.engine.counting.count import count, step_flops
from fd_large.engine.find_model import find_model
from fd_large.engine.predictions import Predictions
from fd_large.errors import CheckpointError, ConfigError, DataError
from fd_large.kernels.choose import Device
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import Run
from fd_large.tasks.classification.job import FineTuningJob, LinearProbeJob
from fd_large.tasks.classification.section import FineTune
from fd_large.tasks.jobs import job_of, transfer_of
from fd_large.weights.load import load_model
from fd_large.weights.resolve import Sources

TINY = Architecture(embed_dim=16, depths=(1,), num_heads=(2,), patch_size=8)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    labelled_folder(tmp_path)
    run = registry.get("finetune_clip_vit_base")
    return replace(
        run,
        student=replace(run.student, architecture=TINY),
        data=replace(run.data, root=str(tmp_path), image_size=16, workers=0),
        runtime=replace(run.runtime, run_dir=str(tmp_path)),
    )


def measured(run: Run) -> dict[str, float]:
    """What a test in batches of three says of random weights."""
    job = FineTuningJob(run)
    torch.manual_seed(0)
    task = job.make_task().eval()
    torch.nn.init.normal_(task.head.weight)
    engine = SimpleNamespace(
        task=task, deepspeed=task, stage=1, config={"bf16": {"enabled": False}}
    )
    (evaluation,) = job.evaluations(engine, job.open_samples(), 3)
    return evaluation.measure(0, True, lambda: None)[0]


def test_what_cannot_be_read_is_named_and_not_counted(run, tmp_path, caplog):
    whole = measured(run)
    broken = tmp_path / "val" / "class0" / "4.png"
    broken.write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        found = measured(run)
    assert "4.png" in caplog.text
    assert found != whole
    predictions = Predictions.read(tmp_path)
    assert list(predictions.labels).count(NO_LABEL) == 1
    usable = predictions.labels != NO_LABEL
    right = (predictions.predicted == predictions.labels)[usable]
    assert found["test_top1"] == pytest.approx(100 * right.mean())
    broken.unlink()
    assert found == pytest.approx(measured(run))
    broken.write_bytes(b"no image")
    strict = replace(run, data=replace(run.data, max_bad_fraction=0.0))
    with pytest.raises(DataError, match=r"max_bad_fraction: .* 1 of 7 .*4\.png"):
        measured(strict)


def test_one_class_is_refused(run, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "class1").rename(tmp_path / f"{split}_b")
    with pytest.raises(DataError, match=r"data\.root: .*got class0 "):
        FineTuningJob(run).open_samples()


def test_an_interval_without_pictures_is_refused(run):
    with pytest.raises(ConfigError, match=r"eval\.knn_every: "):
        replace(run.eval, knn_every=10)


def test_images_are_normalised_as_those_of_the_weights(run, vit_weights):
    student = replace(
        run.student,
        model="clip_vit_base_patch16",
        architecture=tiny_runs.VIT,
        init=str(vit_weights),
    )
    started = replace(run, student=student, data=replace(run.data, image_size=32))
    settled = FineTuningJob(started).settle(Sources())
    assert settled.task.finetune.statistics == (*OPENAI_CLIP.mean, *OPENAI_CLIP.std)
    assert FineTuningJob(settled).stored_student().statistics == OPENAI_CLIP
    # What the recipe says stays.
    own = (0.5,) * 6
    said = replace(started, task=replace(run.task, finetune=FineTune(statistics=own)))
    assert FineTuningJob(said).settle(Sources()).task.finetune.statistics == own
    assert FineTuningJob(run).settle(Sources()).task.finetune.statistics == ()


def test_the_backbone_of_a_fine_tuned_model_is_exported(run, tmp_path):
    """It gives the tokens whose mean the classifier takes, normalised; its own statistics too."""
    run = replace(run, task=replace(run.task, finetune=FineTune(statistics=(0.5,) * 6)))
    torch.manual_seed(0)
    task = FineTuningJob(run).make_task().eval()
    tensors = {name: parameter.detach() for name, parameter in task.named_parameters()}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(run.to_dict()))
    store_tensors(tmp_path / "run", tensors, recipe=run.to_dict())
    export(str(tmp_path / "run"), str(tmp_path / "out"), "timm")
    net, statistics = load_model(tmp_path / "out")
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        raw = task.student(images).tokens
        close(net(images).tokens, torch.nn.functional.layer_norm(raw, raw.shape[-1:], eps=1e-6))
    assert statistics.mean == (0.5,) * 3
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the classifier is left out. Its final norm only normalises" in card
    assert str(tmp_path) not in card


@pytest.fixture
def probe(tmp_path):
    probe = registry.get("linear_probe")
    return replace(
        probe,
        student=replace(probe.student, architecture=TINY),
        data=replace(probe.data, root=str(labelled_folder(tmp_path)), image_size=16, workers=0),
        batch=replace(probe.batch, global_batch_size=8),
    )


def test_groups_have_to_divide_the_global_batch(probe):
    LinearProbeJob(probe).check()
    # Fewer images than a group are one.
    assert LinearProbeJob(probe).make_task()._norm_batch == 8
    task = replace(probe.task, linear=replace(probe.task.linear, norm_batch=3))
    with pytest.raises(ConfigError, match=r"task\.linear\.norm_batch: .*got 3"):
        LinearProbeJob(replace(probe, task=task)).check()


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


def test_parts_of_groups_are_counted_as_what_they_load_and_said(probe, caplog):
    job = LinearProbeJob(probe)
    part, whole = (step_flops(job, size, checkpointing=False).model for size in (1, 8))
    # The layer alone is computed for one image: forward and the gradient of its weight.
    assert whole - part == 7 * 2 * (2 * 16 * 1000)
    counts = counted_at(job, 8)
    assert counts.step_flops(8).model == whole
    (hook,) = job.hooks()
    for size, said in ((16, False), (4, True)):
        hook.on_start(SimpleNamespace(micro_batch_size=size))
        assert ("got 4, so that each micro batch loads" in caplog.text) == said


def test_a_plan_counts_a_group_whose_images_are_all_its_own(probe):
    batch = replace(probe.batch, global_batch_size=16)
    task = replace(probe.task, linear=replace(probe.task.linear, norm_batch=4))
    probe = replace(probe, batch=batch, task=task)
    job = LinearProbeJob(probe)
    alone = step_flops(job, 4, checkpointing=False).frozen / 4
    for asked, images in (("auto", 4), (8, 8)):
        counts = counted_at(job, asked)
        assert counts.images == images
        assert counts.flops_per_image("inference") == alone


def test_training_learns_from_bfloat16_and_tests_from_float32(probe):
    job = LinearProbeJob(probe)
    job.build(bfloat16=True, node_size=1, persistence_threshold=0)
    frozen = job.make_task()._frozen[0]
    assert {p.dtype for p in frozen.learning.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in frozen.tested.parameters()} == {torch.float32}
    _, (counted,) = job.models_on_shapes()
    assert counted is not frozen.learning
    assert not any(p.requires_grad for p in counted.parameters())


def test_a_checkpoint_is_of_one_frozen_model(probe):
    job, other = (
        LinearProbeJob(replace(probe, runtime=replace(probe.runtime, seed=seed))) for seed in (0, 1)
    )
    for one in (job, other):
        one.build(bfloat16=False, node_size=1, persistence_threshold=0)
    job.check_stored(job.facts())
    with pytest.raises(CheckpointError, match=r"student\.init: .*model"):
        job.check_stored(other.facts())
    with pytest.raises(CheckpointError, match="no model"):
        job.stored_student()


def test_a_named_model_is_probed_by_the_one_recipe(probe):
    named = find_model("vit_base_patch16=random", job_of)
    transfer = transfer_of("linear")
    assert transfer.recipe_for(named.architecture, run_recipe=None) == "linear_probe"
    started = transfer.starting_from(
        probe, named.section, image_size=224, trained_as=None, fields=()
    )
    assert (started.student.model, started.data.image_size) == ("vit_base_patch16", 224)

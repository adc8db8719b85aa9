"""A refused step is run again: on which weights, to which numbers, and what cannot be."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file, save_file

from fd_large.checkpoint import store
from fd_large.data.loader import Batch
from fd_large.engine.forward_backward import prepared
from fd_large.engine.replay import _read, replay
from fd_large.engine.student import group_norms
from fd_large.errors import CheckpointError, ConfigError, FDError
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.sections import Student
from fd_large.tasks.jobs import job_of

IMAGES = torch.randint(
    0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
STEP = 9


@pytest.fixture
def made(tmp_path):
    """A run's folder with checkpoints of 3, 5, 8 and 12 steps, its task, and refused steps."""
    run = tiny_runs.tiny_run()
    run = replace(run, student=replace(run.student, drop_path_rate=0.5))
    task = tiny_runs.tiny_task(run)
    for update in (3, 5, 8, 12):
        tiny_runs.store_task(tmp_path, run, task, update=update)
    file = tiny_runs.store_incident(tmp_path, STEP, list(IMAGES.split(2)), [0.5, 0.25])
    return tmp_path, run, task, file


def expected_numbers(run, task):
    """Losses of the two micro batches, and the norm of their mean's gradient, in plain torch."""
    positions = torch.arange(4) + 40
    task.train()
    losses = []
    for part in (slice(0, 2), slice(2, 4)):
        batch = Batch(IMAGES[part], 2, positions[part], positions[part])
        losses.append(task(**prepared(task, batch, run.runtime.seed))[0])
    (sum(losses) / 2).backward()
    norms = [p.grad.norm() for p in task.parameters() if p.grad is not None]
    return [loss.item() for loss in losses], torch.stack(norms).norm().item()


@pytest.mark.parametrize("checkpointing", ["off", "every"])
def test_the_numbers_are_those_of_the_step(made, checkpointing):
    folder, run, task, file = made
    student = replace(run.student, activation_checkpointing=checkpointing)
    recipe = replace(run, student=student).to_dict()
    (folder / "recipe.json").write_text(json.dumps(recipe))
    replayed = replay(file, job_of)
    assert [(one.rank, one.recorded) for one in replayed.micro_batches] == [(0, 0.5), (0, 0.25)]
    losses, norm = expected_numbers(run, task)
    assert replayed.losses == pytest.approx(losses, rel=1e-6)
    assert replayed.grad_norm == pytest.approx(norm, rel=1e-5)


def test_images_come_back_in_the_sizes_of_their_micro_batches(made):
    folder, *_ = made
    parts = [IMAGES[:2], IMAGES[2:, :, :20, :28]]
    file = tiny_runs.store_incident(folder, STEP + 1, parts, [0.5, 0.25])
    found = [one.batch.images for one in _read(file)[1]]
    assert all(map(torch.equal, found, parts))
    # An older file has one size and does not say which.
    at = file.parent / "rank_00000.safetensors"
    stored = load_file(at)
    save_file({name: stored[name] for name in ("images", "positions")}, at)
    found = [one.batch.images for one in _read(file)[1]]
    assert [tuple(part.shape) for part in found] == [(2, 3, 32, 32)] * 2


def test_another_teacher_is_told(made):
    folder, run, task, file = made
    assert "hash" in replay(file, job_of).other_training
    job = job_of(run)
    job.build(bfloat16=False, node_size=1, persistence_threshold=0)
    tiny_runs.store_task(folder, run, task, update=STEP, facts=job.facts())
    assert replay(file, job_of).other_training == ""


def test_bfloat16_rounds_as_the_run_did(made):
    folder, _, _, file = made
    exact = replay(file, job_of)
    (folder / "deepspeed.json").write_text('{"bf16": {"enabled": true}}')
    low = replay(file, job_of)
    assert low.losses != exact.losses
    assert low.losses == pytest.approx(exact.losses, rel=0.05)


@pytest.mark.parametrize(("gone", "found"), [([], 8), ([8], 5), ([8, 5], 3), ([3, 5, 8], 12)])
def test_weights_are_the_newest_from_before_the_step(made, gone, found):
    folder, _, _, file = made
    for update in gone:
        shutil.rmtree(store.checkpoints_of(folder) / store.name_of(update))
    assert replay(file, job_of).checkpoint == found


def test_a_damaged_checkpoint_is_passed_over(made, caplog):
    folder, _, _, file = made
    part = store.checkpoints_of(folder) / store.name_of(8) / store.file_of(1)
    part.write_bytes(part.read_bytes()[:-1])
    assert replay(file.parent, job_of).checkpoint == 5
    assert "step_00000008: rank_00001" in caplog.text
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match="got none"):
        replay(file, job_of)


def no_teacher(folder):
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["teacher"]["source"] = "/no/such/file.pt"
    (folder / "recipe.json").write_text(json.dumps(recipe))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda folder, at: shutil.rmtree(at), "incident not found"),
        (lambda folder, at: (at / "incident.json").write_text("{"), r"incident\.json: "),
        (lambda folder, at: (at / "incident.json").write_text("[]"), r"incident\.json: "),
        (lambda folder, at: (at / "rank_00000.safetensors").unlink(), "images of this incident"),
        (lambda folder, at: (at / "rank_00000.safetensors").write_text("x"), "damaged"),
        (lambda folder, at: (folder / "recipe.json").unlink(), "not in its run"),
        (lambda folder, at: (folder / "deepspeed.json").unlink(), r"deepspeed\.json"),
        (lambda folder, at: no_teacher(folder), "/no/such/file.pt"),
    ],
)
def test_what_cannot_be_replayed_is_one_sentence(made, spoil, said):
    folder, _, _, file = made
    spoil(folder, file.parent)
    with pytest.raises(FDError, match=said):
        replay(file.parent, job_of)


@pytest.mark.parametrize(
    "name", ["index", "off", "epoch", "world_size", "micro_batch_size", "grad_norm"]
)
@pytest.mark.parametrize("value", [None, "x"], ids=["missing", "of another type"])
def test_a_damaged_incident_is_told_when_it_is_read(made, name, value):
    file = made[-1]
    said = json.loads(file.read_text())
    said |= {name: value}
    if value is None:
        del said[name]
    file.write_text(json.dumps(said))
    with pytest.raises(ConfigError, match=r"got (KeyError|TypeError) "):
        replay(file, job_of)


@pytest.mark.parametrize("spoil", ["micro batch", "names"])
def test_counts_that_do_not_fit_are_told(made, spoil):
    file = made[-1]
    said = json.loads(file.read_text())
    if spoil == "names":
        said["ranks"][0]["names"].pop()
    else:
        said["micro_batch_size"] = 0
    file.write_text(json.dumps(said))
    with pytest.raises(ConfigError, match="got ValueError"):
        replay(file, job_of)


def test_a_task_with_targets_is_refused(made):
    folder, _, _, file = made
    recipe = registry.get("finetune_clip_vit_base").to_dict()
    (folder / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ConfigError, match="task finetune"):
        replay(file, job_of)


@pytest.fixture
def normed(tmp_path):
    """A run whose student has batch norms, and its task; stored in a folder."""
    student = Student(
        model="timm:mobilenetv3_small_050",
        architecture=Architecture(feature_stride=8),
        norm_batch=4,
    )
    run = replace(tiny_runs.tiny_run(), student=student)
    task = tiny_runs.tiny_task(run)
    buffers = {name: b for name, b in task.named_buffers() if b.is_floating_point()}
    tiny_runs.store_task(tmp_path, run, task, buffers, update=8)
    return run, task


def test_images_that_share_statistics_on_several_ranks_are_one_micro_batch(normed, tmp_path):
    run, task = normed
    file = tiny_runs.store_incident(tmp_path, STEP, list(IMAGES.split(2)), [0.5, 0.25])
    (replayed,) = (found := replay(file, job_of)).micro_batches
    assert (replayed.recorded, len(replayed.names)) == (0.375, 4)
    group_norms(task.train(), 4)
    positions = torch.arange(4) + 40
    batch = Batch(IMAGES, 2, positions, positions)
    expected, _ = task(**prepared(task, batch, run.runtime.seed))
    assert found.losses == pytest.approx([expected.item()], rel=1e-6)


@pytest.mark.usefixtures("normed")
def test_images_of_some_of_the_ranks_that_share_statistics_are_not_enough(tmp_path):
    file = tiny_runs.store_incident(tmp_path, STEP, [IMAGES[:2]], [0.5])
    incident = json.loads(file.read_text())
    file.write_text(json.dumps(incident | {"ranks": incident["ranks"] * 2}))
    with pytest.raises(ConfigError, match="1 of 2 ranks"):
        replay(file, job_of)

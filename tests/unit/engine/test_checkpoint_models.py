"""The folder of a run as a teacher's or a student's source."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from loading import close, initial, loaded, opened, scattered, student_run
from own_net import NET
from stored_run import store_student, store_tensors

from fd_large import doors
from fd_large.backbones.registry import build
from fd_large.checkpoint import store
from fd_large.engine.checkpoint_models import student_of
from fd_large.engine.find_model import find_model
from fd_large.errors import CheckpointError, WeightsError
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.tasks.classification.section import FineTune
from fd_large.tasks.jobs import job_of

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SWIN = {"embed_dim": 16, "num_heads": (2, 4), "depths": (2, 3), "window_size": 4, "patch_size": 2}
VIT = {"embed_dim": 32, "depths": (2,), "num_heads": (2,), "patch_size": 8}
NETS = [
    ("swinv2_base", {**SWIN, "extra_norm_every": 2, "shared_position_bias": True}),
    ("vit_base_patch16", VIT),
    ("dino_vit_base_patch16", {**VIT, "norm_eps": 1e-5}),
    ("swin_base_esvit", {**SWIN, "image_size": 32}),
]


@pytest.fixture
def stored(tmp_path):
    """Stores a net's weights as a run's checkpoint; returns the net."""

    def store_net(name, fields, update, stage=3):
        run = registry.get("fd_clip_vit_base")
        student = replace(run.student, model=name, architecture=Architecture(**fields))
        run = replace(run, student=student, data=replace(run.data, image_size=32))
        architecture = replace(student.architecture, image_size=32)
        net = scattered(build(name, architecture), seed=update).requires_grad_(False)
        tensors = {f"student.{n}": t for n, t in net.named_parameters()}
        tensors |= {"projection.weight": torch.zeros(2, net.width)}
        tensors |= {"projection.bias": torch.zeros(2)}
        store_tensors(tmp_path, tensors, update=update, ranks=3, stage=stage, recipe=run.to_dict())
        return net

    return store_net


@pytest.mark.parametrize(("name", "fields"), NETS)
@pytest.mark.parametrize("stage", [2, 3])
def test_a_run_teaches(stored, tmp_path, name, fields, stage):
    stored(name, fields, 3, stage)
    net = stored(name, fields, 5, stage)
    again, teacher = loaded(tmp_path)
    assert torch.equal(again(IMAGES).tokens, net(IMAGES).tokens)
    # The recipe says which checkpoint it was, and finds it again once the run has gone on.
    assert teacher.source.endswith("step_00000005")
    stored(name, fields, 7, stage)
    again, _ = loaded(teacher.source)
    close(again(IMAGES).tokens, net(IMAGES).tokens)


def test_a_student_goes_on_from_a_run(stored, tmp_path):
    net = stored("vit_base_patch16", VIT, 3)
    again, student = initial(tmp_path, "vit_base_patch16", 32, **VIT)
    assert torch.equal(again(IMAGES).tokens, net(IMAGES).tokens)
    assert student.init.endswith("step_00000003")


def test_a_fine_tuned_vit_has_a_norm_that_only_normalises(tmp_path):
    run = registry.get("finetune_clip_vit_base")
    fields = Architecture(**VIT, relative_position="block")
    student = replace(run.student, architecture=fields)
    own = FineTune(statistics=(0.5, 0.4, 0.3, 0.2, 0.3, 0.4))
    task = replace(run.task, finetune=own)
    run = replace(run, student=student, task=task, data=replace(run.data, image_size=32))
    net = scattered(build(student.model, replace(fields, image_size=32)), seed=3)
    torch.nn.init.ones_(net.norm.weight)
    torch.nn.init.zeros_(net.norm.bias)
    tensors = {f"student.{n}": t.detach() for n, t in net.named_parameters()}
    del tensors["student.norm.weight"], tensors["student.norm.bias"]
    tensors |= {"fc_norm.weight": torch.rand(32), "head.weight": torch.rand(10, 32)}
    store_tensors(tmp_path, tensors, ranks=2, recipe=run.to_dict())
    again, teacher = loaded(tmp_path)
    assert torch.equal(again(IMAGES).tokens, net(IMAGES).tokens)
    assert teacher.statistics == own.statistics


@pytest.mark.parametrize("part", ["", "#teacher"])
def test_own_code_that_changed_since_the_training_is_said(tmp_path, caplog, part):
    code, run = tmp_path / "net.py", tmp_path / "run"
    code.write_text(NET)
    doors.allow(code)
    name = f"module:{code}:Net"
    facts = {"code": doors.hashes(name)}
    store_student(run, name, {}, source=name, teacher=Architecture(), facts=facts)
    find_model(f"{run}{part}", job_of).build()
    assert "NOT THE FILE" not in caplog.text
    doors.reset()
    doors.allow(code)
    code.write_text(f"{NET}\n# Edited.\n")
    find_model(f"{run}{part}", job_of).build()
    assert f"{name} is NOT THE FILE that made this model" in caplog.text
    assert facts["code"][name][:12] in caplog.text


@pytest.mark.parametrize("recorded", [7, ["x"], {"x": 7}, None])
def test_a_foreign_record_of_code_is_no_traceback(tmp_path, caplog, recorded):
    code, run = tmp_path / "net.py", tmp_path / "run"
    code.write_text(NET)
    doors.allow(code)
    store_student(run, f"module:{code}:Net", {}, facts={"code": recorded})
    find_model(str(run), job_of).build()
    assert "NOT THE FILE" not in caplog.text


def test_another_net_is_refused(stored, tmp_path):
    stored("vit_base_patch16", VIT, 3)
    with pytest.raises(WeightsError, match="of the run"):
        student_run(tmp_path, "vit_base_patch16", 32)


def test_a_damaged_checkpoint_is_not_passed_over_in_silence(stored, tmp_path):
    for update in (3, 4):
        stored("vit_base_patch16", VIT, update)
    open_one = partial(student_of, tmp_path, "--teacher.source", job_of)
    (store.checkpoints_of(tmp_path) / store.name_of(4) / store.file_of(2)).unlink()
    with pytest.raises(CheckpointError, match=rf"{store.name_of(4)}.*{store.name_of(3)}"):
        open_one()


def test_no_sound_checkpoint(stored, tmp_path):
    stored("vit_base_patch16", VIT, 3)
    (store.checkpoints_of(tmp_path) / store.name_of(3) / store.receipt_of(0)).unlink()
    with pytest.raises(CheckpointError, match=r"--teacher\.source.*sound"):
        student_of(tmp_path, "--teacher.source", job_of)


def test_other_paths_are_left_to_others(tmp_path):
    assert student_of(tmp_path, "weights", job_of) is None
    assert student_of(tmp_path / "file.pth", "weights", job_of) is None


def test_without_a_reader_a_run_is_no_source(stored, tmp_path):
    stored("vit_base_patch16", VIT, 3)
    with pytest.raises(WeightsError, match="Export the student"):
        opened(tmp_path)

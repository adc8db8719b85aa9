"""Masked runs on ranks, resumed and with stored maps: their losses and masks depend on neither."""

from __future__ import annotations

import pytest
import torch
from closeness import distance
from kills import state
from launch import ROOT, run_ranks, start_ranks
from pictures import write_pictures
from twin import losses

TRAIN = ROOT / "fd_large/train.py"
STUDENT = """
--student.model vit_base_patch16 --student.architecture.embed_dim 16
--student.architecture.depths 2 --student.architecture.num_heads 2
--student.architecture.patch_size 4"""
TEACHER = """
--teachers.{0}.model clip_vit_base_patch16 --teachers.{0}.architecture.embed_dim 16
--teachers.{0}.architecture.depths 1 --teachers.{0}.architecture.num_heads 2
--teachers.{0}.architecture.patch_size 4 --teachers.{0}.source random"""
RUN = """
--data.image_size 32 --data.workers 1 --batch.global_batch_size 12
--optim.base_lr 0.1 --optim.warmup_lr 0.05 --optim.min_lr 0.01 --runtime.log_every 1 """
BLOCKS = "--mask.sampler block --mask.min_patches 12"
DROPPED = "--mask.sampler random --mask.ratio 0.75 --mask.student dropped"
DECODER = "--mask.decoder_width 16 --mask.decoder_depth 1 --mask.decoder_heads 2"


def words(flags: str, folder, **fields: object) -> list[object]:
    """The arguments of a run in a folder; fields by name with _ for the first dot."""
    own = [(f"--{name.replace('_', '.', 1)}", value) for name, value in fields.items()]
    stage = ROOT / "ds_configs/zero3.json"
    named = [part for pair in own for part in pair]
    return ["--deepspeed_config", stage, *flags.split(), "--runtime.run_dir", folder, *named]


@pytest.mark.closeness
@pytest.mark.parametrize(
    "mask",
    [
        f"{BLOCKS} --teachers.first.targets map summary",
        f"{DROPPED} --mask.tokens visible --mask.cls True",
        f"{DROPPED} {DECODER}",
    ],
    ids=["blocks", "visible", "decoder"],
)
def test_ranks_and_micro_batches_and_recomputation_change_no_loss(mask, tmp_path):
    flags = f"{STUDENT} {TEACHER.format('first')} {RUN} {mask} --optim.max_steps 3"
    pictures = write_pictures(tmp_path / "pictures", 40)
    own = {"data_root": pictures, "eval_root": pictures}
    run_ranks(TRAIN, *words(flags, tmp_path / "one", batch_micro_batch_size=12, **own), ranks=1)
    divided = {"batch_micro_batch_size": 2, "student_activation_checkpointing": "every"}
    run_ranks(TRAIN, *words(flags, tmp_path / "two", **divided, **own), ranks=2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(set(one)) == len(one) == 3
    assert distance(two, one) <= 1e-6


@pytest.mark.closeness
def test_killed_and_resumed_on_other_ranks_the_losses_are_those_of_a_calm_run(tmp_path):
    teachers = TEACHER.format("first") + TEACHER.format("second")
    flags = f"""{STUDENT} {teachers} {RUN} {BLOCKS} --weighting.rule drop
    --teachers.second.placement sharded --optim.max_steps 6 --runtime.save_every 2
    --batch.micro_batch_size 2"""
    own = {"data_root": write_pictures(tmp_path / "pictures", 40), "eval_root": ""}
    run_ranks(TRAIN, *words(flags, tmp_path / "calm", **own), ranks=2)
    started = start_ranks(TRAIN, *words(flags, tmp_path / "killed", **own), ranks=2)
    try:
        started.until((tmp_path / "killed/checkpoints/step_00000002/manifest.json").exists)
    finally:
        started.kill()
    resumed = run_ranks(TRAIN, *words(flags, tmp_path / "killed", **own), ranks=3)
    assert "resumed after step" in resumed.outputs[0]
    calm, killed = state(tmp_path / "calm", 6), state(tmp_path / "killed", 6)
    assert calm.keys() == killed.keys()
    assert any("mask.token" in name for name in calm)
    assert distance(losses(tmp_path / "killed"), losses(tmp_path / "calm")) <= 4e-6


def test_stored_maps_of_whole_images_teach_as_the_teacher_does(tmp_path):
    flags = f"""{STUDENT} {TEACHER.format("first")} {RUN} {BLOCKS} --optim.max_steps 8
    --batch.micro_batch_size 12"""
    own = {
        "data_root": write_pictures(tmp_path / "pictures", 40),
        "eval_root": "",
        "task_distillation.views": 1,
        "task_distillation.precision": "fp32",
    }
    run_ranks(TRAIN, *words(flags, tmp_path / "live", **own), ranks=1)
    stored = {**own, "task_distillation.cache": tmp_path / "maps"}
    run_ranks(TRAIN, *words(flags, tmp_path / "stored", **stored), ranks=1)
    assert (tmp_path / "maps").is_dir()
    first, second = (torch.tensor(losses(tmp_path / name)) for name in ("live", "stored"))
    assert torch.equal(first, second)

"""Options of several teachers, by pairs, on ranks and resumed: the losses of one process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from closeness import distance
from covering import covering, pairs_of
from kills import state
from launch import ROOT, run_ranks, start_ranks
from pictures import write_pictures
from twin import losses

sys.path.insert(0, str(Path(__file__).parent / "programs"))

import options
from options import FACTORS


@pytest.mark.closeness
def test_every_two_options_meet_and_give_the_losses_of_one_process(tmp_path, monkeypatch):
    for name, head in options.SMALL_HEADS.items():
        monkeypatch.setitem(options.HEADS, name, head)
    rows = {f"run_{number:02d}": row for number, row in enumerate(covering(FACTORS))}
    met = {pair for row in rows.values() for pair in pairs_of(row)}
    assert met == FACTORS.pairs()
    wrong = {}
    for name, (ours, plain) in options.losses_of(rows, tmp_path).items():
        assert len(ours) == len(plain) == options.STEPS
        assert len(set(plain)) == options.STEPS, f"{rows[name]} learns nothing"
        if not (worst := distance(ours, plain)) <= 2e-6:
            wrong[name] = (worst, rows[name])
    assert wrong == {}


TRAIN = ROOT / "fd_large/train.py"
FLAGS = """
--student.model vit_base_patch16 --student.architecture.embed_dim 16
--student.architecture.depths 1 --student.architecture.num_heads 2
--student.architecture.patch_size 8
--teachers.first.model clip_vit_base_patch16 --teachers.first.architecture.embed_dim 16
--teachers.first.architecture.depths 1 --teachers.first.architecture.num_heads 2
--teachers.first.architecture.patch_size 8 --teachers.first.source random
--teachers.first.targets map summary --teachers.first.normaliser running
--teachers.first.summary.loss queue --teachers.first.summary.normaliser none
--teachers.second.model swinv2_base --teachers.second.architecture.embed_dim 8
--teachers.second.architecture.depths 1 1 --teachers.second.architecture.num_heads 1 1
--teachers.second.architecture.window_size 2 --teachers.second.source random
--teachers.second.placement sharded --teachers.second.normaliser batch
--weighting.rule drop --data.image_mixup True --data.image_size 32 --data.workers 1
--batch.global_batch_size 12 --batch.micro_batch_size 2
--optim.max_steps 6 --optim.base_lr 0.1 --optim.warmup_lr 0.05 --optim.min_lr 0.01
--runtime.save_every 2 --runtime.log_every 1 """


@pytest.mark.closeness
def test_killed_and_resumed_on_other_ranks_the_state_of_teachers_keeps_its_bits(tmp_path):
    """The queue has each image's summary: the mixed images of each dataset are the same too."""
    parts = [
        f"{weight} {name}={write_pictures(tmp_path / name, count)}"
        for weight, name, count in ((0.6, "one", 23), (0.4, "two", 17))
    ]
    config = ROOT / "ds_configs/zero3.json"

    def words(folder: str) -> list[object]:
        own = ["--data.root", " + ".join(parts), "--runtime.run_dir", tmp_path / folder]
        return ["--deepspeed_config", config, *FLAGS.split(), "--eval.root", "", *own]

    run_ranks(TRAIN, *words("calm"), ranks=2)
    started = start_ranks(TRAIN, *words("killed"), ranks=2)
    try:
        started.until((tmp_path / "killed/checkpoints/step_00000002/manifest.json").exists)
    finally:
        started.kill()
    resumed = run_ranks(TRAIN, *words("killed"), ranks=3)
    assert "resumed after step" in resumed.outputs[0]
    calm, killed = state(tmp_path / "calm", 6), state(tmp_path / "killed", 6)
    assert calm.keys() == killed.keys()
    kept = [name for name in calm if "queues." in name or "running." in name]
    assert len(kept) >= 3
    assert [name for name in kept if not torch.equal(calm[name], killed[name])] == []
    (queue,) = [calm[name] for name in kept if "queues." in name]
    assert queue.view(-1, 16).any(1).sum() == 6 * 12
    assert distance(losses(tmp_path / "killed"), losses(tmp_path / "calm")) <= 4e-6

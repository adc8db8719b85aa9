"""A run that learns from stored maps is, bit by bit, the one that has the teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from kills import state, stopped
from launch import ROOT, run_ranks
from pictures import write_pictures
from twin import FLAGS, WITH_LOADERS, losses, train, words

LENGTH = ("--optim.epochs", "3", "--runtime.save_every", "3", "--eval.every", "2")


def test_two_ranks_learn_the_same_from_a_cache_and_go_on(tmp_path: Path) -> None:
    pictures, cache = write_pictures(tmp_path / "pictures", 19), tmp_path / "cache"
    evaluated = ("--eval.root", str(write_pictures(tmp_path / "held out", 5)), "--eval.views", "6")
    # The teacher is in shards, and a third rank has fewer maps to write than the others.
    run_ranks(
        *(ROOT / "fd_large" / "__main__.py", "cache", "fd_swinv2g", cache),
        *("--views", 2, "--precision", "fp32"),
        *FLAGS.replace("--recipe fd_swinv2g", "").replace("--runtime.log_every 1", "").split(),
        *("--data.root", pictures, "--batch.global_batch_size", 12, "--batch.micro_batch_size", 4),
        *evaluated,
        ranks=3,
    )
    live, cached = tmp_path / "live", tmp_path / "cached"
    train(pictures, live, *LENGTH, *evaluated, "--task.distillation.views", "2")
    source = (*evaluated, *WITH_LOADERS, "--teacher.source", f"cached:{cache}")
    train(pictures, cached, *LENGTH, *source)
    assert losses(cached) == losses(live)
    wanted, found = state(live, 6), state(cached, 6)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    evaluations = (live / "evaluations.jsonl").read_text()
    assert "held_out_best_constant" in evaluations
    assert (cached / "evaluations.jsonl").read_text() == evaluations
    # From the middle of the second epoch, as the other run had it.
    shutil.rmtree(cached / "checkpoints/step_00000006")
    train(pictures, cached, *LENGTH, *source)
    assert losses(cached) == losses(live)


def test_a_stop_while_the_cache_is_completed_changes_no_bit(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 15)

    def command(name: str) -> tuple[str, ...]:
        cache = ("--task.distillation.views", "2", "--task.distillation.cache", tmp_path / name)
        return tuple(map(str, ("--optim.epochs", 4, "--eval.root", "", *cache)))

    calm, run_dir = tmp_path / "calm", tmp_path / "stopped"
    train(pictures, calm, *command("whole"))
    # An epoch is a step of 8 images. The other 7 are stored in two batches, before the third epoch
    # for one view and before the fourth for the other.
    stops = [("cache", "SIGTERM", 1, 2), ("cache", "SIGUSR1", 0, 3)]
    arguments = words(pictures, run_dir, *command("left"))
    codes, ranks = stopped(arguments, tmp_path / "ranks", stops)
    wanted = [
        {"code": 75, "status": "preempted", "update": 2, "evaluated": True, "left": []},
        {"code": 75, "status": "preempted", "update": 3, "evaluated": True, "left": []},
    ]
    assert codes == [75, 75]
    assert ranks == [wanted, wanted]
    assert sorted(p.name for p in (tmp_path / "left").glob("*.part")) == [
        "view_1-00000.safetensors.part"
    ]
    resumed = train(pictures, run_dir, *command("left"))
    assert "resumed after step 3 of 4" in resumed.outputs[0]
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert len(whole) == 3
    assert {path.name: path.read_bytes() for path in (tmp_path / "left").iterdir()} == whole
    assert losses(run_dir) == losses(calm)
    wanted_state, found = state(calm, 4), state(run_dir, 4)
    assert wanted_state.keys() == found.keys()
    assert all(torch.equal(wanted_state[name], found[name]) for name in found)


def test_a_second_run_beside_an_exact_cache_is_the_one_that_filled_it(tmp_path: Path) -> None:
    """It learns from stored maps from the first step on, and says so; no bit differs."""
    pictures = write_pictures(tmp_path / "pictures", 15)
    cache = ("--task.distillation.views", "2", "--task.distillation.cache", str(tmp_path / "maps"))
    flags = (*cache, "--task.distillation.precision", "fp32", "--optim.epochs", "4")
    flags = (*flags, "--eval.root", "", "--runtime.save_every", "1", "--runtime.keep_last", "9")
    filled, beside = tmp_path / "filled", tmp_path / "beside"
    said = train(pictures, filled, *flags).outputs[0]
    assert "learns from the maps" not in said
    said = train(pictures, beside, *flags).outputs[0]
    assert said.count("learns from the maps") == 2
    assert losses(beside) == losses(filled)
    wanted, found = state(filled, 4), state(beside, 4)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)

    def early(run_dir: Path, step: int) -> list[int]:
        path = run_dir / f"checkpoints/step_{step:08d}/manifest.json"
        return json.loads(path.read_text())["epochs_from_stored_maps"]

    assert [early(filled, 4), early(beside, 4)] == [[], [1, 2]]
    assert json.loads((beside / "summary.json").read_text())["epochs_from_stored_maps"] == [1, 2]
    # The newest checkpoints are lost, and the run goes on from before its cache was full.
    for step in (2, 3, 4):
        shutil.rmtree(filled / f"checkpoints/step_{step:08d}")
    said = train(pictures, filled, *flags).outputs[0]
    assert "epoch 2 learns from the maps" in said
    assert losses(filled) == losses(beside)
    assert early(filled, 4) == [2]

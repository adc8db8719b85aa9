"""A run that learns from stored maps is, bit by bit, the one that has the teacher."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from kills import state
from launch import ROOT, run_ranks
from pictures import write_pictures
from twin import FLAGS, losses, train

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
    source = (*evaluated, "--teacher.source", f"cached:{cache}")
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

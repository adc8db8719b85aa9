"""Trainings of named models, each into its own run folder; nothing is trained here."""

from __future__ import annotations

from fd_large.cli import evaluate
from fd_large.ranks import distributed


def test_a_rank_does_not_read_what_another_may_be_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    told = {"test_top1": 50.0, "test_loss": 1.0}
    monkeypatch.setattr(distributed, "broadcast_object", lambda value: value or told)
    words = ["vit_base_patch16=random", "--task", "finetune"]
    words += ["--data.root", "builtin:photographs", "--out"]
    trained = []

    def train(run, *, deepspeed_config):
        trained.append(run.runtime.run_dir)
        return 0

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    assert evaluate.main([*words, str(tmp_path)]) == 0
    assert trained == [str(tmp_path / "vit_base_patch16_random_seed_0")]

"""Trainings of named models, each into its own run folder; nothing is trained here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_runs
from own_net import NET

from fd_large import doors
from fd_large.cli import evaluate
from fd_large.engine.find_model import find_model
from fd_large.errors import ConfigError
from fd_large.evaluation.recorded_runs import unlike
from fd_large.evaluation.trainings import started_from
from fd_large.ranks import distributed
from fd_large.recipes import registry
from fd_large.tasks.jobs import job_of


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


def test_fewer_epochs_than_the_warm_up_of_the_model_s_recipe_shorten_it(tmp_path, monkeypatch):
    trained = []

    def train(run, *, deepspeed_config):
        trained.append(run)
        return 2

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    words = ["vit_base_patch16=random", "--task", "finetune", "--data.root", "builtin:photographs"]
    words += ["--optim.epochs", "1", "--optim.base_lr", "1e-3", "--out", str(tmp_path)]
    evaluate.main(words)
    (run,) = trained
    own = registry.get(run.name).optim
    assert run.optim.warmup_epochs == pytest.approx(own.warmup_epochs / own.epochs)
    assert run.optim.min_lr / run.optim.base_lr == pytest.approx(own.min_lr / own.base_lr)


def test_a_training_that_an_earlier_version_began_goes_on_with_its_ends(tmp_path, monkeypatch):
    trained = []

    def train(run, *, deepspeed_config):
        trained.append(run)
        return 2

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    words = ["vit_base_patch16=random", "--task", "finetune", "--data.root", "builtin:photographs"]
    words += ["--optim.base_lr", "1e-3", "--out", str(tmp_path)]
    evaluate.main(words)
    begun = trained[0].to_dict()
    begun["optim"] |= {"min_lr": 2e-6, "warmup_lr": 3e-6}
    folder = tmp_path / "vit_base_patch16_random_seed_0"
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(begun))
    evaluate.main(words)
    assert (trained[1].optim.min_lr, trained[1].optim.warmup_lr) == (2e-6, 3e-6)


def test_the_official_probe_sets_features_side_by_side(tmp_path, monkeypatch):
    trained = []

    def train(run, *, deepspeed_config):
        trained.append(run)
        Path(run.run_dir()).mkdir(parents=True)
        told = {"test_top1": 50.0 + len(trained), "test_loss": 1.0}
        Path(run.run_dir(), "summary.json").write_text(json.dumps(told))
        return 0

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    models = [str(tiny_runs.vit_file(tmp_path)), "swinv2_tiny=random"]
    words = ["--task", "linear", "--protocol", "official", "--data.root", "builtin:photographs"]
    words += ["--data.image_size", "32", "--out"]
    assert evaluate.main([*models, *words, str(tmp_path / "out")]) == 0
    pools = [(Path(run.run_dir()).name, run.task.linear.pool) for run in trained]
    assert pools == [
        ("vit_seed_0", "mean"),
        ("vit_class_token_seed_0", "cls"),
        ("vit_class_token_and_mean_seed_0", "both"),
        ("swinv2_tiny_random_seed_0", "mean"),
    ]
    nets = json.loads((tmp_path / "out" / "summary.json").read_text())["nets"]
    assert [net["label"] for net in nets[:2]] == ["vit, mean of patches", "vit, class token"]
    assert nets[1]["unlike_first"] == {}, "another feature is no other training"
    del trained[:]
    more = ["--pool", "both"]
    assert evaluate.main([models[0], *words, str(tmp_path / "both"), *more]) == 0
    assert [run.task.linear.pool for run in trained] == ["both"]


def test_all_models_take_the_recipe_of_the_first_one(tmp_path, monkeypatch, capsys):
    trained = []

    def train(run, *, deepspeed_config):
        trained.append(run)
        Path(run.run_dir()).mkdir(parents=True)
        told = {"test_top1": 50.0, "test_loss": 1.0}
        Path(run.run_dir(), "summary.json").write_text(json.dumps(told))
        return 0

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    models = [str(tiny_runs.vit_file(tmp_path)), "swinv2_tiny=random"]
    words = ["--task", "finetune", "--data.root", "builtin:photographs"]
    words += ["--data.image_size", "32", "--out"]
    assert evaluate.main([*models, *words, str(tmp_path / "out")]) == 0
    first, random = trained
    assert first.name == random.name == "finetune_clip_vit_base_plain"
    assert first.optim.layer_decay == 0.6
    assert random.optim.layer_decay == 1.0, "random weights have none"
    assert unlike(first, random) == {"optim.layer_decay": (0.6, 1.0)}
    assert first.student.model != random.student.model
    nets = json.loads((tmp_path / "out" / "summary.json").read_text())["nets"]
    assert [net["unlike_first"] for net in nets] == [{}, {"optim.layer_decay": [0.6, 1.0]}]
    told = capsys.readouterr().out
    assert "finetune_clip_vit_base_plain *" in " ".join(told.split())
    assert "optim.layer_decay 1 (0.6)" in " ".join(told.split())

    # A decay that the user sets is every row's, and so is a recipe.
    del trained[:]
    given = ["--recipe", "finetune_dino_vit_base", "--optim.layer_decay", "0.7"]
    assert evaluate.main([*models, *words, str(tmp_path / "given"), *given]) == 0
    assert [run.optim.layer_decay for run in trained] == [0.7, 0.7]
    assert unlike(*trained) == {}


def test_a_model_of_unknown_layers_is_trained_without_layer_decay(tmp_path):
    code = tmp_path / "net.py"
    code.write_text(NET)
    doors.allow(code)
    model = find_model(f"module:{code}:Net", job_of)
    base = registry.get("finetune_clip_vit_base")
    started = started_from(model, base, {})
    assert started.optim.layer_decay == 1.0
    assert started.student.model == f"module:{code}:Net"
    assert started.student.init == "", "the file makes its weights itself"
    with pytest.raises(ConfigError, match=r"no layer_id.*Set --optim.layer_decay 1"):
        started_from(model, base, {"optim.layer_decay": 0.7})

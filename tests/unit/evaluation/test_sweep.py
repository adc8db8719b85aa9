"""`evaluate --sweep`: what trials see, what wins, and where it goes on."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_runs
from html_page import check_page
from labelled_folder import labelled_folder

import fd_large
from fd_large.cli.main import main
from fd_large.evaluation.sweep import with_point
from fd_large.recipes import registry

WORDS = ["--task", "finetune", "--sweep", "--sweep_rates", "1", "2", "4"]
WORDS += ["--sweep_decays", "0.8", "1", "--optim.base_lr", "1e-3", "--seeds", "2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return labelled_folder(tmp_path_factory.mktemp("images"), train=54, val=6, side=2)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return str(tiny_runs.vit_file(tmp_path_factory.mktemp("weights")))


@pytest.fixture
def trained(monkeypatch):
    """The recipes of the trainings: rate 2e-3 with decay 1 is the best, 4e-3 diverges."""
    runs = []

    def train(run, *, deepspeed_config):
        runs.append(run)
        folder = Path(run.run_dir())
        (folder / "checkpoints").mkdir(parents=True)
        if run.optim.base_lr == 4e-3:
            (folder / "summary.json").write_text('{"status": "guard"}')
            return 3
        accuracy = 50 - 1e4 * abs(run.optim.base_lr - 2e-3) + run.optim.layer_decay
        found = {"test_top1": accuracy, "test_loss": 1.0}
        (folder / "summary.json").write_text(json.dumps(found))
        return 0

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    # Nothing is built that would have to go, and it takes a second.
    monkeypatch.setattr("gc.collect", lambda: 0)
    return runs


def test_the_best_of_held_out_images_trains_on_all_with_every_seed(
    images, vit, trained, tmp_path, capsys
):
    words = ["evaluate", vit, *WORDS, "--data.root", str(images), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    trials, runs = trained[:9], trained[9:]
    assert "9 trials (0 of them done before)" in capsys.readouterr().out
    own = registry.get(trials[0].name).optim.layer_decay
    assert own not in (0.8, 1.0)
    for run in trials:
        assert (run.data.root, run.data.val_fraction) == (str(images / "train"), 0.1)
        assert not (Path(run.run_dir()) / "checkpoints").exists()
    assert {(run.optim.base_lr, run.optim.layer_decay) for run in trials} == {
        (rate, decay) for rate in (1e-3, 2e-3, 4e-3) for decay in (own, 0.8, 1.0)
    }
    for seed, run in enumerate(runs):
        assert (run.data.root, run.data.val_fraction) == (str(images), 0.0)
        assert (run.optim.base_lr, run.optim.layer_decay, run.runtime.seed) == (2e-3, 1.0, seed)
        assert (Path(run.run_dir()) / "checkpoints").exists()

    (row,) = json.loads((tmp_path / "out" / "summary.json").read_text())["nets"]
    sweep = row["sweep"]
    assert (sweep["base_lr"], sweep["layer_decay"], sweep["held_out_accuracy"]) == (2e-3, 1.0, 51.0)
    assert sweep["at_edge"] == [], "no decay is above 1"
    accuracies = [trial["held_out_accuracy"] for trial in sweep["trials"]]
    assert len(accuracies) == 9
    assert accuracies[6:] == [None] * 3, "of rate 4e-3"
    page = check_page(tmp_path / "out" / "report.html")
    assert {"0.002", "rate x 4", "rate x 2", "51.00", "diverged"} <= set(page.words)

    # One trial was not finished when the first start ended.
    (Path(trials[3].run_dir()) / "trial.json").unlink()
    for run in runs:
        (Path(run.run_dir()) / "checkpoints").rmdir()
    del trained[:]
    assert main(words) == 0
    assert trained == [trials[3], *runs]

    # Trials of anything else are not taken.
    del trained[:]
    shutil.copytree(images, tmp_path / "copy")
    others = {
        "optim.epochs 50 -> 30": ["--optim.epochs", "30"],
        "optim.epochs 50 -> 130": ["--optim.epochs", "130"],
        "data.root": ["--data.root", str(tmp_path / "copy")],
    }
    for said, more in others.items():
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    file = Path(trials[0].run_dir()) / "trial.json"
    record = json.loads(file.read_text())
    for name in ("images", "weights"):
        file.write_text(json.dumps({**record, name: "another"}))
        assert main(words) == 2
        assert f"got {name} 'another' -> " in capsys.readouterr().err
    file.write_text(json.dumps(record))
    assert not trained

    # A grid below the best says so, and has the recipe's own rate besides.
    other = words.index("--sweep_rates")
    words[other + 1 : other + 4] = ["0.5"]
    for run in runs:
        (Path(run.run_dir()) / "checkpoints").rmdir()
    assert main(words) == 0
    assert "at an edge of the grid (rate)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("without", [math.nan, None])
def test_a_trial_without_a_score_is_never_the_best(images, vit, tmp_path, monkeypatch, without):
    """A maximum keeps a NaN that comes first."""
    runs = []

    def train(run, *, deepspeed_config):
        runs.append(run)
        folder = Path(run.run_dir())
        folder.mkdir(parents=True, exist_ok=True)
        found = {"test_top1": without if len(runs) == 1 else 10.0, "test_loss": 1.0}
        (folder / "summary.json").write_text(json.dumps(found))
        return 0

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    monkeypatch.setattr("gc.collect", lambda: 0)
    words = ["evaluate", vit, *WORDS, "--data.root", str(images), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    (row,) = json.loads((tmp_path / "out" / "summary.json").read_text())["nets"]
    scores = [trial["held_out_accuracy"] for trial in row["sweep"]["trials"]]
    assert scores[0] is None
    assert row["sweep"]["held_out_accuracy"] == 10.0


@pytest.mark.parametrize(("code", "status"), [(3, "not saved"), (75, "preempted")])
def test_what_is_no_divergence_ends_the_sweep(images, vit, tmp_path, monkeypatch, code, status):
    runs = []

    def train(run, *, deepspeed_config):
        runs.append(run)
        (Path(run.run_dir()) / "summary.json").write_text(json.dumps({"status": status}))
        return code

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    words = ["evaluate", vit, *WORDS, "--data.root", str(images), "--out", str(tmp_path / "out")]
    assert main(words) == code
    assert main(words) == code
    assert runs == runs[:1] * 2, "the trial is not finished"


def test_a_sweep_that_trains(images, tmp_path):
    run = tiny_runs.tiny_run()
    tiny_runs.store_task(tmp_path / "run", run, tiny_runs.tiny_task(run))

    def evaluate():
        return fd_large.evaluate(
            tmp_path / "run",
            data={"root": images, "workers": 0},
            task="finetune",
            out=tmp_path / "out",
            sweep=True,
            sweep_rates=(0.5,),
            sweep_decays=(registry.get("finetune_esvit_swin_base").optim.layer_decay,),
            recipe="finetune_esvit_swin_base",
            batch={"global_batch_size": 4, "micro_batch_size": 4},
            **{"optim.max_steps": 2, "optim.warmup_epochs": 0.0},
        )

    (row,) = evaluate().summary["nets"]
    trials = row["sweep"]["trials"]
    assert [trial["rate"] for trial in trials] == [0.5, 1.0]
    for trial in trials:
        folder = Path(trial["run"])
        record = json.loads((folder / "trial.json").read_text())
        summary = json.loads((folder / "summary.json").read_text())
        assert record["held_out_accuracy"] == summary["test_top1"] == trial["held_out_accuracy"]
        assert record["weights"]
        assert not (folder / "checkpoints").exists()
    # The run goes on: its weights are others.
    run = tiny_runs.tiny_run()
    tiny_runs.store_task(tmp_path / "run", run, tiny_runs.tiny_task(run), update=9)
    with pytest.raises(fd_large.FDError, match=r"weights .\d+ bytes"):
        evaluate()


def test_every_row_tries_the_recipes_of_all_and_random_weights_no_layer_decay(
    images, vit, tmp_path, monkeypatch, capsys
):
    runs = []

    def train(run, *, deepspeed_config):
        runs.append(run)
        folder = Path(run.run_dir())
        folder.mkdir(parents=True, exist_ok=True)
        # The teacher's recipe is the better one for the student, too.
        accuracy = 60.0 if run.name == "finetune_clip_vit_base_plain" else 50.0
        told = {"test_top1": accuracy, "test_loss": 1.0}
        (folder / "summary.json").write_text(json.dumps(told))
        return 0

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    run = tiny_runs.tiny_run()
    run = replace(run, name="fd_swinv2_base", data=replace(run.data, root=str(images / "train")))
    tiny_runs.store_task(tmp_path / "mine", run, tiny_runs.tiny_task(run))
    models = [str(tmp_path / "mine"), vit, f"{tmp_path / 'mine'}#scratch"]
    words = [
        *models,
        "--task",
        "finetune",
        "--sweep",
        "--sweep_rates",
        "1",
        "--sweep_decays",
        "0.7",
    ]
    assert (
        main(["evaluate", *words, "--data.root", str(images), "--out", str(tmp_path / "out")]) == 0
    )
    recipes = ["finetune_swinv2_base", "finetune_clip_vit_base_plain"]
    tried = {}
    for one in runs[:-3]:
        row = Path(one.run_dir()).parent.name
        tried.setdefault(row, []).append((one.name, one.optim.layer_decay))
    assert tried["mine"] == [
        (recipes[0], 0.7),
        (recipes[0], 0.8),
        (recipes[1], 0.6),
        (recipes[1], 0.7),
    ]
    assert sorted(tried["vit"]) == sorted(tried["mine"])
    assert tried["vit"][0][0] == recipes[1], "a model's own comes first"
    assert tried["mine_from_scratch"] == [(recipes[0], 1.0), (recipes[1], 1.0)]
    assert {one.name for one in runs[-3:]} == {recipes[1]}

    nets = json.loads((tmp_path / "out" / "summary.json").read_text())["nets"]
    assert [net["recipe"] for net in nets] == [recipes[1]] * 3
    assert [net["unlike_first"] for net in nets] == [{}, {}, {"optim.layer_decay": [0.6, 1.0]}]
    seen = [net["sweep"]["held_out_seen_by"] for net in nets]
    assert seen == [[f"{tmp_path / 'mine'} (fd_swinv2_base)"], [], []]
    unknown = [len(net["sweep"]["held_out_not_known"]) for net in nets]
    assert unknown == [0, 1, 0], "of the teacher's file alone nothing is known"
    told = " ".join(capsys.readouterr().out.split())
    assert "mine: the held-out images that chose the settings were training images of" in told
    assert "optim.layer_decay 1 (0.6)" in told


def test_what_cannot_be_swept(images, vit, trained, tmp_path, capsys):
    both = ["--data.root", str(images), "--out", str(tmp_path / "out")]
    (tmp_path / "source.py").write_text(
        "import numpy as np\n"
        "class Source:\n"
        "    def __init__(self, part): pass\n"
        "    def __len__(self): return 20\n"
        "    def __getitem__(self, number): return np.zeros((2, 2), np.uint8)\n"
        "    def labels(self): return np.arange(20) % 2, None\n"
    )
    cases = {
        "--optim.layer_decay: the sweep decides it": [*both, "--optim.layer_decay", "0.5"],
        "--eval.best_metric: the final runs would be": [*both, "--eval.best_metric", "test_top1"],
        "--data.val_fraction: the sweep holds out": [*both, "--data.val_fraction", "0.2"],
        "--sweep_rates 1e-06: with the recipe finetune_clip_vit_base": [
            *(*both, "--sweep_rates", "1e-6", "--optim.min_lr", "1e-6")
        ],
        "--sweep: only a folder of images": ["--data.root", f"module:{tmp_path}/source.py:Source"],
    }
    for said, more in cases.items():
        assert main(["evaluate", vit, *WORDS, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["evaluate", "x", "--task", "finetune", "--sweep_rates", "3"]) == 2
    assert "--sweep: missing" in capsys.readouterr().err
    assert main(["evaluate", "vit_base_patch16=random", "--task", "knn", "--sweep"]) == 2
    assert "--sweep: not used by knn" in capsys.readouterr().err
    official = ["--task", "linear", "--protocol", "official", "--sweep"]
    assert main(["evaluate", "vit_base_patch16=random", *official]) == 2
    assert "--sweep: not used by linear" in capsys.readouterr().err
    assert not trained


def test_the_ends_of_a_schedule_follow_the_rate_of_a_trial():
    recipe = registry.get("finetune_clip_vit_base")
    trial = with_point(recipe, 0.5, 0.7, ["optim.min_lr"]).optim
    assert trial.base_lr == recipe.optim.base_lr / 2
    assert trial.warmup_lr == recipe.optim.warmup_lr / 2
    assert trial.min_lr == recipe.optim.min_lr
    assert trial.layer_decay == 0.7
    assert with_point(recipe, 1.0, recipe.optim.layer_decay, ()) == recipe

"""`evaluate --sweep`: what trials see, what wins, and where it goes on; without training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from html_page import check_page
from PIL import Image

from fd_large.cli.main import main

WORDS = ["vit_base_patch16=random", "--task", "finetune", "--sweep", "--sweep_rates", "1", "2", "4"]
WORDS += ["--sweep_decays", "0.8", "1", "--optim.base_lr", "1e-3", "--seeds", "2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for number in range(60):
        part = "val" if number < 6 else "train"
        folder = root / part / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 2), number).save(folder / f"{number}.png")
    return root


@pytest.fixture
def trained(monkeypatch):
    """The recipes of the trainings, of which that with rate 2e-3 and decay 1 is the best."""
    runs = []

    def train(run, *, deepspeed_config):
        runs.append(run)
        folder = Path(run.run_dir())
        (folder / "checkpoints").mkdir(parents=True)
        accuracy = 50 - 1e4 * abs(run.optim.base_lr - 2e-3) + run.optim.layer_decay
        found = {"test_top1": accuracy, "test_loss": 1.0}
        (folder / "summary.json").write_text(json.dumps(found))
        return 0

    monkeypatch.setattr("fd_large.cli.train.train_run", train)
    return runs


def test_the_best_of_held_out_images_trains_on_all_with_every_seed(
    images, trained, tmp_path, capsys
):
    words = ["evaluate", *WORDS, "--data.root", str(images), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    trials, runs = trained[:6], trained[6:]
    assert "6 trials (0 of them done before)" in capsys.readouterr().out
    for run in trials:
        assert (run.data.root, run.data.val_fraction) == (str(images / "train"), 0.1)
        assert not (Path(run.run_dir()) / "checkpoints").exists()
    assert {(run.optim.base_lr, run.optim.layer_decay) for run in trials} == {
        (rate, decay) for rate in (1e-3, 2e-3, 4e-3) for decay in (0.8, 1.0)
    }
    for seed, run in enumerate(runs):
        assert (run.data.root, run.data.val_fraction) == (str(images), 0.0)
        assert (run.optim.base_lr, run.optim.layer_decay, run.runtime.seed) == (2e-3, 1.0, seed)
        assert (Path(run.run_dir()) / "checkpoints").exists()

    (row,) = json.loads((tmp_path / "out" / "summary.json").read_text())["nets"]
    sweep = row["sweep"]
    assert (sweep["base_lr"], sweep["layer_decay"], sweep["held_out_accuracy"]) == (2e-3, 1.0, 51.0)
    assert sweep["at_edge"] == [], "no decay is above 1"
    assert len(sweep["trials"]) == 6
    page = check_page(tmp_path / "out" / "report.html")
    assert {"0.002", "rate x 4", "rate x 2", "51.00"} <= set(page.words)

    # One trial was not finished when the first start ended.
    (Path(trials[3].run_dir()) / "trial.json").unlink()
    for run in runs:
        (Path(run.run_dir()) / "checkpoints").rmdir()
    del trained[:]
    assert main(words) == 0
    assert trained == [trials[3], *runs]

    # A grid below the best says so; its trials are not those of another recipe.
    assert main([*words, "--optim.epochs", "30"]) == 2
    assert "optim.epochs 100 -> 30" in capsys.readouterr().err
    other = words.index("--sweep_rates")
    words[other + 1 : other + 4] = ["0.5", "1"]
    for run in runs:
        (Path(run.run_dir()) / "checkpoints").rmdir()
    assert main(words) == 0
    assert "at an edge of the grid (rate)" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_be_swept(images, trained, tmp_path, capsys):
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
        "--data.val_fraction: the sweep holds out": [*both, "--data.val_fraction", "0.2"],
        "--sweep_rates 1e-06: of finetune_clip_vit_base": [*both, "--sweep_rates", "1e-6"],
        "--sweep: only a folder of images": ["--data.root", f"module:{tmp_path}/source.py:Source"],
    }
    for said, more in cases.items():
        assert main(["evaluate", *WORDS, *more]) == 2
        assert said in capsys.readouterr().err
    assert main(["evaluate", "x", "--task", "finetune", "--sweep_rates", "3"]) == 2
    assert "--sweep: left out" in capsys.readouterr().err
    assert main(["evaluate", "vit_base_patch16=random", "--task", "knn", "--sweep"]) == 2
    assert "--sweep: not used by knn" in capsys.readouterr().err
    official = ["--task", "linear", "--protocol", "official", "--sweep"]
    assert main(["evaluate", "vit_base_patch16=random", *official]) == 2
    assert "--sweep: not used by linear" in capsys.readouterr().err
    assert not trained

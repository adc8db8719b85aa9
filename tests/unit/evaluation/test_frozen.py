"""Models as they are: their map, their class token, and what the heads of a run make of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny_runs
import torch

import fd_large
from fd_large.cli.export import export
from fd_large.cli.main import main
from fd_large.engine.zero.partition import running_statistics
from fd_large.errors import ConfigError
from fd_large.evaluation.frozen import FrozenFlags


def test_an_image_size_that_the_model_does_not_take(labelled_images, capsys):
    words = ["timm:test_vit=random", "--task", "knn", "--data.root", str(labelled_images)]
    assert main(["evaluate", *words, "--data.image_size", "40"]) == 2
    assert "--data.image_size" in capsys.readouterr().err


@pytest.mark.parametrize(("features", "got"), [(("own", "own"), "own own"), ((), "nothing")])
def test_features_are_given_once_each(features, got):
    with pytest.raises(ConfigError, match=f"^--features: .*got {got}, "):
        FrozenFlags(features=features)


def test_nearest_neighbours_of_the_class_token_stand_beside_the_mean(labelled_images, tmp_path):
    common = ["--data.root", str(labelled_images), "--data.workers", "0", "--out", str(tmp_path)]
    small = ["--data.image_size", "32", "--batch_size", "8"]
    assert main(["evaluate", "vit_base_patch16=random", "--task", "knn", *small, *common]) == 0
    found = json.loads((tmp_path / "summary.json").read_text())["nets"]
    name = "vit_base_patch16, random"
    assert [net["label"] for net in found] == [f"{name}, mean of patches", f"{name}, class token"]


def test_a_probe_sets_each_feature_beside_the_same_one_of_the_first_model(
    labelled_images, tmp_path
):
    common = ["--data.root", str(labelled_images), "--data.workers", "0", "--out", str(tmp_path)]
    small = ["--data.image_size", "32", "--batch_size", "8", "--probe_rates", "0.1"]
    models = ["vit_base_patch16=random", "timm:test_vit=random", "timm:resnet18=random"]
    assert main(["evaluate", *models, "--task", "linear", *small, *common]) == 0
    nets = json.loads((tmp_path / "summary.json").read_text())["nets"]
    # A timm model's class token stands beside its map.
    first, second = "vit_base_patch16, random", "test_vit, random"
    kinds = ("mean of patches", "class token", "class token and mean")
    labels = [f"{model}, {kind}" for model in (first, second) for kind in kinds]
    assert [net["label"] for net in nets] == [*labels, "resnet18, random"]
    beside = [net.get("difference", {}).get("to") for net in nets]
    assert beside[0] is None
    assert beside[1:3] == [labels[0]] * 2
    assert beside[3:6] == labels[:3]
    assert beside[6] == labels[0]


def test_few_labels_are_the_same_for_every_model(labelled_images, tmp_path):
    common = ["--data.root", str(labelled_images), "--data.workers", "0", "--out", str(tmp_path)]
    small = ["--data.image_size", "32", "--k", "1", "--data.per_class", "2"]
    models = ["timm:resnet18=random", "timm:test_vit=random"]
    assert main(["evaluate", *models, "--task", "knn", *small, *common]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["training_images"] == 2 * summary["classes"]


def test_a_probe_of_few_steps_is_warned_of_once(labelled_images, tmp_path, capsys):
    words = ["--data.root", str(labelled_images), "--out", str(tmp_path), "--data.workers", "0"]
    words += ["--data.image_size", "32", "--batch_size", "8", "--task", "linear", "--pool", "mean"]
    assert main(["evaluate", "timm:test_vit=random", *words, "--seeds", "2"]) == 0
    told = capsys.readouterr()
    assert (told.out + told.err).count("the linear probe makes only") == 1


def test_what_the_heads_of_a_run_make_of_its_map(labelled_images, tmp_path, capsys):
    run = tiny_runs.several_teachers(tiny_runs.tiny_run())
    task = tiny_runs.tiny_task(run)
    tiny_runs.store_task(tmp_path / "run", run, task, others=running_statistics(task))
    export(str(tmp_path / "run"), str(tmp_path / "exported"), "timm", "5GB")
    models = [str(tmp_path / "run"), str(tmp_path / "exported"), f"{tmp_path / 'run'}#plain"]
    common = ["--task", "knn", "--k", "1", "--data.root", str(labelled_images)]
    common += ["--data.workers", "0", "--data.image_size", "32", "--pool", "mean"]
    common += ["--out", str(tmp_path / "out")]
    features = ["own", "plain", "both.summary"]
    assert main(["evaluate", *models, *common, "--features", *features]) == 0
    with np.load(tmp_path / "out/predictions.npz") as kept:
        found = {name.removeprefix("predicted/"): kept[name] for name in kept.files}
    names = ["", ", head plain", ", head both.summary"]
    assert list(found) == [
        "labels",
        *(f"{model}{name}" for model in ("run", "exported") for name in names),
        "run: plain",
    ]
    for name in names:
        assert (found[f"run{name}"] == found[f"exported{name}"]).all()
    # With one neighbour it is the nearest image's class.
    model = fd_large.load_student(tmp_path / "run")
    files = [sorted((labelled_images / part).rglob("*.png")) for part in ("train", "test")]
    with torch.no_grad():
        rows = [
            model.teacher_summary("both", torch.stack([model.preprocess(f) for f in part]))
            for part in files
        ]
    train, test = (torch.nn.functional.normalize(row, dim=1) for row in rows)
    classes = [int(files[0][i].parent.name[-1]) for i in (test @ train.T).argmax(1)]
    labels = [int(file.parent.name[-1]) for file in files[1]]
    right = sum(a == b for a, b in zip(classes, labels, strict=True))
    assert (found["run, head both.summary"] == found["labels"]).sum() == right
    capsys.readouterr()
    for model, feature, words in (
        (models[0], "plane", "nearest: plain"),
        (models[2], "plain", "none of the models has heads"),
    ):
        assert main(["evaluate", model, *common, "--features", feature]) == 2
        assert words in capsys.readouterr().err

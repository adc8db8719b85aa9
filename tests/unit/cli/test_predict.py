"""`predict` and `evaluate` of a detection run that was stored, not trained."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from coco import CATEGORIES
from detection_batches import narrow_run
from detection_twin import pictures
from stored_run import store_tensors

from fd_large.checkpoint import store
from fd_large.cli.main import main
from fd_large.recipes import registry
from fd_large.tasks.detection.job import DetectionJob

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("coco"), 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory, coco):
    folder = tmp_path_factory.mktemp("run")
    recipe = narrow_run("coco_mask_rcnn_swinv2_tiny", image_size=64)
    numbers = replace(recipe.task.detection, num_classes=len(CATEGORIES), detections_per_image=5)
    recipe = replace(recipe, task=replace(recipe.task, detection=numbers))
    recipe = replace(recipe, data=replace(recipe.data, root=str(coco), workers=0))
    torch.manual_seed(0)
    tensors = {name: p.detach() for name, p in DetectionJob(recipe).make_task().named_parameters()}
    stored = store_tensors(folder, tensors, ranks=2, recipe=recipe.to_dict())
    manifest = json.loads((stored / "manifest.json").read_text())
    manifest["categories"] = {str(one["id"]): one["name"] for one in CATEGORIES}
    # Written anew, with its own sum.
    manifest.pop("crc32", None)
    part = stored.with_name(stored.name + store.PART)
    stored.rename(part)
    store.commit(part, manifest)
    (folder / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    return folder


def test_a_picture_that_cannot_be_read_leaves_the_others(run, coco, tmp_path, capsys):
    bad, good = tmp_path / "bad.jpg", next((coco / "val2017").iterdir())
    bad.write_bytes(b"no image")
    out = tmp_path / "seen"
    words = ["predict", str(run), str(bad), str(good), "--out", str(out), "--score"]
    assert main([*words, "0.99"]) == 2
    told = capsys.readouterr()
    assert "bad.jpg: not an image" in told.err
    # Nothing is sure in a random model: the image is drawn without a mark.
    assert json.loads((out / "predictions.json").read_text()) == {str(good): []}
    assert len(list(out.glob("*.png"))) == 1
    assert main(["predict", str(run), str(good), "--out", str(out), "--score", "0"]) == 0
    seen = json.loads((out / "predictions.json").read_text())[str(good)]
    assert 0 < len(seen) <= 5
    assert {one["class"] for one in seen} <= {"cat", "dog", "brush"}


def test_a_task_without_scores_takes_none(tmp_path, coco, capsys):
    recipe = registry.get("nyuv2_linear")
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.to_dict()))
    image = next((coco / "val2017").iterdir())
    assert main(["predict", str(tmp_path), str(image), "--score", "0.3"]) == 2
    assert "--score: the predictions of the task depth have no scores" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["predict", "RUN"], "IMAGE"),
        (["predict", "RUN", "nowhere.jpg"], "nowhere.jpg"),
        (["predict", "nowhere", "a.jpg"], "nowhere"),
        (["evaluate", "nowhere", "--task", "detection"], "nowhere"),
        (["evaluate", "RUN", "RUN"], "one run at a time"),
        (["evaluate", "RUN", "--k", "3"], "--k"),
        (["evaluate", "RUN", "--data.image_size", "32"], "--data.image_size"),
        (["evaluate", "RUN", "--data.root", "nowhere"], "data.root"),
    ],
)
def test_mistakes_name_the_argument(run, words, found, capsys):
    assert main([str(run) if word == "RUN" else word for word in words]) == 2
    assert found in capsys.readouterr().err


def test_classes_of_another_set_are_refused(run, tmp_path, capsys):
    other = pictures(tmp_path, 2)
    path = other / "annotations/instances_val2017.json"
    path.write_text(path.read_text().replace('"dog"', '"wolf"'))
    assert main(["evaluate", str(run), "--data.root", str(other), "--data.workers", "0"]) == 2
    assert "got 'wolf' for label 1, expected 'dog'" in capsys.readouterr().err


def test_the_task_may_be_named(run, coco, tmp_path, capsys):
    words = ["--task", "detection", "--data.root", str(coco), "--data.workers", "0"]
    assert main(["evaluate", str(run), *words, "--out", str(tmp_path / "out")]) == 0
    assert "AP50" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/scores.json").read_text())["num_images"] == 3

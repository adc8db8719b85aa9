"""Depth as a job: mistakes that end before anything heavy, its stored student and predictions."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dense_jobs import check, exported, with_root
from depth_batches import narrow_run
from depth_images import write_images

from fd_large.backbones.statistics import IMAGENET
from fd_large.errors import ConfigError, DataError
from fd_large.tasks.depth.job import DepthJob
from fd_large.tasks.depth.section import Depth
from fd_large.tasks.depth.stored import StoredDepth

SWIN, VIT, LINEAR = "nyuv2_swinv2_giant", "nyuv2_vit_base", "nyuv2_linear"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("nyu"))


def run_of(root, name: str = SWIN, **own):
    return with_root(narrow_run(name, **own), root)


@pytest.mark.parametrize("name", [SWIN, VIT, LINEAR])
def test_a_whole_dataset_is_fine(name, root):
    assert len(check(run_of(root, name)).test_images()) == 6


def test_mistakes_name_their_field(root):
    with pytest.raises(ConfigError, match=r"test_windows.*got 0"):
        check(run_of(root, VIT, test_windows=0))
    run = run_of(root, VIT)
    shape = replace(run.student.architecture, patch_size=14)
    with pytest.raises(ConfigError, match=r"data\.image_size: .*got 64 .*--data\.image_size 70"):
        check(replace(run, student=replace(run.student, architecture=shape)))
    with pytest.raises(ConfigError, match=r"test_crop: .*72 x 96"):
        check(run_of(root, test_crop="nyu"))
    with pytest.raises(DataError, match=r"task\.depth\.val_list"):
        check(run_of(root, val_list="nowhere.txt"))
    run = run_of(root, LINEAR)
    with pytest.raises(ConfigError, match=r"student\.drop_path_rate: "):
        check(replace(run, student=replace(run.student, drop_path_rate=0.1)))
    run = run_of(root)
    with pytest.raises(ConfigError, match=r"data\.color_jitter: "):
        check(replace(run, data=replace(run.data, color_jitter=0.4)))
    for field, value in (
        ("depth_scale", 0.0),
        ("valid_range", (3.0, 1.0)),
        ("min_depth", 10.0),
        ("loss_lambda", 1.5),
        ("cut_depth", -0.1),
        ("test_windows", 1),
        ("bottom_crop", (352, 0)),
        ("head_width", 0),
    ):
        with pytest.raises(ConfigError, match=rf"task\.depth\.{field}"):
            Depth(**{field: value})


@pytest.mark.parametrize(("name", "to"), [(SWIN, "fd"), (LINEAR, "fd")])
def test_the_backbone_is_exported_as_the_next_start_takes_it(name, to, tmp_path):
    run = run_of("/somewhere/nyu", name)
    found = exported(run, tmp_path, to, told="trained to estimate depth on nyu")
    for key, parameter in found.model.named_parameters():
        trained = found.trained.get(f"student.{key}")
        assert key.startswith("norm.") or torch.equal(parameter, trained), key
    # What trained between 0 and 1 is used so.
    assert (found.facts == IMAGENET) == run.task.depth.normalise


def test_predictions_are_drawn_and_written(root, tmp_path, monkeypatch):
    job = DepthJob(run_of(root))
    stored = StoredDepth(job)
    bright = SimpleNamespace(predict=lambda pixels: pixels[:, 0].float() / 100 + 1)
    monkeypatch.setattr(stored, "task", lambda reader: bright)
    image = str(next((root / "official_splits/test").rglob("*.jpg")))
    none = str(tmp_path / "none.jpg")
    found = list(stored.predict(None, [image, none], tmp_path / "out", least_score=0.5))
    assert found[0].drawn.is_file()
    assert found[1].problem
    seen = json.loads((tmp_path / "out" / "predictions.json").read_text())[image]
    depth = np.load(tmp_path / "out" / seen["depth"])
    assert depth.shape == (72, 96)
    assert depth.min() == pytest.approx(seen["nearest"])
    assert 1 < seen["nearest"] <= seen["median"] <= seen["farthest"] < 4

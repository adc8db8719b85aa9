"""Segmentation as a job: mistakes that end before anything heavy, its stored student, classes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from dense_jobs import check, exported, with_root
from segmentation_batches import narrow_run
from segmentation_twin import write_images

from fd_large.errors import ConfigError, DataError
from fd_large.tasks.jobs import job_of
from fd_large.tasks.segmentation.job import test_views
from fd_large.tasks.segmentation.section import Segmentation

SWIN, VIT, LINEAR = "ade20k_upernet_swinv2_giant", "ade20k_upernet_vit_base", "ade20k_linear"
test_views.__test__ = False


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("ade"))


def run_of(root, name: str = SWIN, **own):
    return with_root(narrow_run(name, **own), root)


def test_a_whole_dataset_is_fine(root):
    classes = check(run_of(root)).facts()["classes"]
    assert classes["names"] == ["red", "green", "blue", "grey"]
    assert json.loads(json.dumps(classes)) == classes


def test_mistakes_name_their_field(root):
    with pytest.raises(ConfigError, match=r"test_mode.*got whole"):
        check(run_of(root, VIT, test_mode="whole"))
    with pytest.raises(DataError, match=r"got 4, .* 1 to 3"):
        check(run_of(root, num_classes=3))
    with pytest.raises(ConfigError, match=r"test_stride: .*got 65, .* = 64"):
        check(run_of(root, VIT, test_stride=65))
    check(run_of(root, VIT, test_stride=64))
    run = run_of(root, LINEAR)
    with pytest.raises(ConfigError, match=r"student\.drop_path_rate: "):
        check(replace(run, student=replace(run.student, drop_path_rate=0.1)))
    run = run_of(root)
    with pytest.raises(ConfigError, match=r"data\.color_jitter: "):
        check(replace(run, data=replace(run.data, color_jitter=0.4)))
    for field, value in (
        ("scale_range", (2.0, 1.0)),
        ("cat_max_ratio", 0.0),
        ("test_scales", ()),
        ("test_size", (9, 3)),
        ("num_classes", 1),
        ("num_classes", 2**15 + 1),
    ):
        with pytest.raises(ConfigError, match=rf"task\.segmentation\.{field}"):
            Segmentation(**{field: value})


def test_a_part_of_the_training_images_takes_the_place_of_the_val_split(tmp_path):
    run = run_of(write_images(tmp_path / "ade", 12))
    every = {*job_of(run).open_samples()}
    divided = replace(run, data=replace(run.data, val_fraction=0.25))
    job = check(divided)
    learnt, tested = {*job.open_samples()}, {*job.test_images()}
    assert learnt
    assert tested == every - learnt
    other = write_images(tmp_path / "other", 2)
    job = check(replace(divided, eval=replace(run.eval, root=str(other))))
    assert {*job.open_samples()} == learnt
    assert all(str(other / "images" / "validation") in path for path in job.test_images())


def test_how_a_recipe_s_test_sees_an_image():
    views = test_views(narrow_run(VIT, image_size=64, test_stride=0))
    assert (views.short_side, views.long_side, views.crop, views.stride) == (64, 256, 64, 42)
    views = test_views(narrow_run(SWIN, test_size=(80, 90), test_flip=True))
    assert (views.short_side, views.long_side, views.crop, views.flip) == (80, 90, 0, True)


@pytest.mark.parametrize(("name", "to"), [(SWIN, "fd"), (VIT, "timm"), (LINEAR, "fd")])
def test_the_backbone_is_exported_as_the_next_start_takes_it(name, to, tmp_path):
    run = run_of("/somewhere/ade", name)
    found = exported(run, tmp_path, to, told="trained to segment ade")
    for key, parameter in found.model.named_parameters():
        trained = found.trained.get(f"student.{key}")
        assert torch.equal(parameter, found.stored[key]), key
        assert key.startswith("norm.") or torch.equal(parameter, trained), key

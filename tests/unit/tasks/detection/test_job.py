"""Detection as a job: the user's mistakes that end before anything heavy."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from coco import CATEGORIES
from detection_batches import narrow_run
from detection_twin import pictures

from fd_large.data.sampler import Portion
from fd_large.errors import ConfigError, DataError
from fd_large.tasks.detection.job import DetectionJob

ANNOTATIONS = "annotations/instances_val2017.json"


def run_of(root, **sections):
    run = narrow_run("coco_mask_rcnn_swinv2_tiny")
    numbers = replace(run.task.detection, num_classes=len(CATEGORIES))
    run = replace(run, task=replace(run.task, detection=numbers))
    run = replace(run, data=replace(run.data, root=str(root)))
    changes = {name: replace(getattr(run, name), **c) for name, c in sections.items()}
    return replace(run, **changes)


def check(run) -> DetectionJob:
    job = DetectionJob(run)
    job.open_samples()
    job.check()
    return job


def edit(root, change) -> None:
    content = json.loads((root / ANNOTATIONS).read_text())
    change(content)
    (root / ANNOTATIONS).write_text(json.dumps(content))


def test_a_whole_data_set_is_fine(tmp_path):
    job = check(run_of(pictures(tmp_path)))
    assert job.facts() == {"categories": {"3": "cat", "7": "dog", "90": "brush"}}


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("data", "color_jitter", 0.4),
        ("data", "min_crop_scale", 0.5),
        ("eval", "knn_root", "somewhere"),
        ("eval", "views", 8),
    ],
)
def test_a_field_without_a_meaning_here_is_refused(tmp_path, section, field, value):
    with pytest.raises(ConfigError, match=rf"{section}\.{field}: "):
        check(run_of(pictures(tmp_path), **{section: {field: value}}))


def test_other_classes_in_the_test_are_refused(tmp_path):
    root = pictures(tmp_path)
    names = {3: "cat", 7: "brush", 90: "dog"}
    edit(root, lambda c: [one.update(name=names[one["id"]]) for one in c["categories"]])
    with pytest.raises(DataError, match=r"other classes.*got 'brush' for label 1.*'dog'"):
        check(run_of(root))


def test_no_split_for_tests_names_the_field_for_another(tmp_path):
    root = pictures(tmp_path)
    (root / ANNOTATIONS).unlink()
    with pytest.raises(DataError, match=r"split 'val'.*Set --eval\.root"):
        check(run_of(root))
    other = pictures(tmp_path / "other")
    check(run_of(root, eval={"root": str(other)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("bbox"), "without 'bbox'"),
        (lambda a: a.update(segmentation={"size": [3, 3], "counts": "abc"}), "cannot be read"),
    ],
)
def test_what_cannot_be_scored_is_found_before_training(tmp_path, change, message):
    root = pictures(tmp_path)
    edit(root, lambda content: change(content["annotations"][0]))
    with pytest.raises(DataError, match=message):
        check(run_of(root))


def test_an_annotation_may_leave_crowd_and_area_open(tmp_path):
    root = pictures(tmp_path)
    edit(root, lambda content: content["annotations"][0].update(iscrowd=None, area=None))
    check(run_of(root))


def test_whole_pictures_of_one_orientation_in_a_batch(tmp_path):
    run = run_of(pictures(tmp_path, 8))
    numbers = replace(run.task.detection, whole_size=(40, 60, 90))
    run = replace(run, task=replace(run.task, detection=numbers))
    job = DetectionJob(replace(run, data=replace(run.data, workers=0)))
    portion = Portion(0, 0, 4, 0, 1)
    for batch in job.batches(job.open_samples(), portion):
        sizes = batch.targets.sizes
        assert len({bool(width >= height) for height, width in sizes.tolist()}) == 1
        assert 40 <= sizes.min() <= 60
        assert sizes.max() <= 90
    probe = job.probe_batch(2)
    assert probe.images.shape == (2, 3, 60, 90)
    assert probe.targets.targets[0].masks.shape[1:] == (60, 90)
    assert probe.targets.sizes.tolist() == [[60, 90]] * 2
    with pytest.raises(ConfigError, match="scale_range: excluded by whole_size"):
        replace(numbers, scale_range=(1.0, 1.0))
    with pytest.raises(ConfigError, match="whole_size: invalid"):
        replace(numbers, whole_size=(60, 40, 90))


def test_a_set_of_boxes_alone_is_learnt_from(tmp_path):
    root = pictures(tmp_path)
    for split in ("train", "val"):
        path = root / f"annotations/instances_{split}2017.json"
        content = json.loads(path.read_text())
        for one in content["annotations"]:
            del one["segmentation"]
        path.write_text(json.dumps(content))
    run = run_of(root, data={"workers": 0})
    job = DetectionJob(run)
    samples = job.open_samples()
    job.check()
    batch = next(job.batches(samples, Portion(0, 0, 2, 0, 1)))
    task = job.make_task()
    loss, terms = task(**task.prepare(batch.images, batch.targets, None))
    loss.backward()
    assert terms["mask"] == 0 < terms["box"] + terms["rpn_box"]

"""Detection as a job: mistakes that end before anything heavy, its batches, its stored student."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from coco import CATEGORIES
from dense_jobs import check, exported, with_root
from detection_batches import narrow_run
from detection_twin import pictures
from stored_run import store_tensors

from fd_large.backbones.registry import build
from fd_large.data.sampler import Portion
from fd_large.engine.checkpoint_models import sources_of
from fd_large.engine.student import student_weights
from fd_large.engine.zero.partition import load_weights
from fd_large.errors import ConfigError, DataError, check_all
from fd_large.tasks.dense.stages import LEFT_OUT
from fd_large.tasks.detection.job import DetectionJob
from fd_large.tasks.jobs import job_of

SWIN, VIT = "coco_mask_rcnn_swinv2_giant", "coco_mask_rcnn_vit_base"

ANNOTATIONS = "annotations/instances_{}2017.json"


def run_of(root, **sections):
    run = narrow_run("coco_mask_rcnn_swinv2_tiny")
    numbers = replace(run.task.detection, num_classes=len(CATEGORIES))
    run = with_root(replace(run, task=replace(run.task, detection=numbers)), root)
    changes = {name: replace(getattr(run, name), **c) for name, c in sections.items()}
    return replace(run, **changes)


def edit(root, change, split: str = "val") -> None:
    path = root / ANNOTATIONS.format(split)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_missing_semantic_maps_are_told_beside_what_the_check_finds(tmp_path):
    run = run_of(pictures(tmp_path))
    htc = replace(run.task.detection, heads="htc", semantic_classes=9)
    job = DetectionJob(replace(run, task=replace(run.task, detection=htc)))
    with pytest.raises(DataError, match="stuffthingmaps"):
        job.open_samples()
    job.check()


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("images"),
        lambda c: c.pop("categories"),
        lambda c: c["images"][0].pop("height"),
    ],
)
def test_what_is_wrong_with_the_training_images_is_told_alone(tmp_path, change):
    root = pictures(tmp_path)
    edit(root, change, "train")
    job = DetectionJob(run_of(root))
    with pytest.raises(DataError, match="instances_train"):
        check_all(job.open_samples, job.check)


def test_a_whole_data_set_is_fine(tmp_path):
    job = check(run_of(pictures(tmp_path)))
    assert job.facts() == {"categories": {"3": "cat", "7": "dog", "90": "brush"}, "masks": True}


def test_other_classes_in_the_test_are_refused(tmp_path):
    root = pictures(tmp_path)
    names = {3: "cat", 7: "brush", 90: "dog"}
    edit(root, lambda c: [one.update(name=names[one["id"]]) for one in c["categories"]])
    with pytest.raises(DataError, match=r"'brush' for label 1.*'dog'"):
        check(run_of(root))


def test_no_split_for_tests_names_the_field_for_another(tmp_path):
    root = pictures(tmp_path)
    (root / ANNOTATIONS.format("val")).unlink()
    with pytest.raises(DataError, match=r"'val'.*--eval\.root"):
        check(run_of(root))
    other = pictures(tmp_path / "other")
    check(run_of(root, eval={"root": str(other)}))


def test_a_part_of_the_training_images_takes_the_place_of_the_val_split(tmp_path):
    root = pictures(tmp_path, 24)
    (root / ANNOTATIONS.format("val")).unlink()
    whole = job_of(run_of(root)).open_samples()
    run = run_of(root, data={"root": str(root), "val_fraction": 0.25})
    job = check(run)
    learnt, tested = {*job.open_samples()}, {*job.test_images(("cat", "dog", "brush"))}
    assert learnt
    assert tested == {*whole} - learnt
    other = str(pictures(tmp_path / "other", 2))
    job = check(replace(run, eval=replace(run.eval, root=other)))
    assert len(job.test_images(("cat", "dog", "brush"))) == 2
    assert {*job.open_samples()} == learnt


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
    with pytest.raises(ConfigError, match=r"scale_range.*whole_size"):
        replace(numbers, scale_range=(1.0, 1.0))
    with pytest.raises(ConfigError, match="whole_size: invalid"):
        replace(numbers, whole_size=(60, 40, 90))


def test_a_set_of_boxes_alone_is_learnt_from(tmp_path):
    root = pictures(tmp_path)
    for split in ("train", "val"):
        edit(root, lambda c: [one.pop("segmentation") for one in c["annotations"]], split)
    run = run_of(root, data={"workers": 0})
    job = DetectionJob(run)
    samples = job.open_samples()
    job.check()
    batch = next(job.batches(samples, Portion(0, 0, 2, 0, 1)))
    task = job.make_task()
    loss, terms = task(**task.prepare(batch.images, batch.targets, None))
    loss.backward()
    assert terms["mask"] == 0 < terms["box"] + terms["rpn_box"]
    copied = replace(run.task.detection, copy_instances=0.5)
    with pytest.raises(ConfigError, match=r"task\.detection\.copy_instances: .*masks"):
        DetectionJob(replace(run, task=replace(run.task, detection=copied))).open_samples()


@pytest.mark.parametrize("name", [SWIN, VIT])
def test_a_detector_goes_on_from_a_detector(name, tmp_path):
    run = narrow_run(name)
    # A ViT's positions stay those of its distillation, whatever the size of the images.
    run = replace(run, data=replace(run.data, image_size=64))
    torch.manual_seed(3)
    first = DetectionJob(run).make_task()
    tensors = {n: p.detach() for n, p in first.named_parameters()}
    store_tensors(tmp_path, tensors, ranks=2, recipe=run.to_dict())
    sources = sources_of(job_of)
    again = job_of(replace(run, student=replace(run.student, init=str(tmp_path)))).settle(sources)
    torch.manual_seed(4)
    second = DetectionJob(again).make_task()
    weights = student_weights(again.student, sources, without=LEFT_OUT)
    load_weights(second.student, weights, where="--student.init")
    for key, parameter in second.student.named_parameters():
        assert torch.equal(parameter, tensors[f"student.{key}"]), key
    # Whoever wants the whole model gets a final norm that only normalises, and a class token of 0.
    net = build(again.student.model, again.student.architecture)
    weights = sources.resolve(tmp_path).published
    shapes = {key: tuple(p.shape) for key, p in net.named_parameters()}
    assert weights.shapes() == shapes
    for key in shapes.keys() & LEFT_OUT.keys():
        assert (weights.file[key] == LEFT_OUT[key]).all()


@pytest.mark.parametrize(("name", "to"), [(SWIN, "fd"), (VIT, "timm")])
def test_the_backbone_of_a_detector_is_exported(name, to, tmp_path):
    """What a student would start from: the norm only normalises, and class tokens are zero."""
    run = narrow_run(name)
    run = replace(run, data=replace(run.data, image_size=64, root="/somewhere/coco"))
    found = exported(run, tmp_path, to, told="trained to detect objects of coco")
    for key, parameter in found.model.named_parameters():
        shared = key.endswith("attn.relative_position_bias_table") and key not in found.stored
        if not shared:
            assert torch.equal(parameter, found.stored[key]), key


@pytest.mark.parametrize("masks", [True, False])
def test_a_detector_goes_on_from_another_with_what_fits_of_its_heads(tmp_path, masks):
    torch.manual_seed(0)
    run = run_of(tmp_path)
    own = dict(DetectionJob(run).make_task().named_parameters())
    facts = {"masks": masks}
    store_tensors(tmp_path / "run", own, ranks=2, recipe=run.to_dict(), facts=facts)
    more = replace(run.task.detection, num_classes=9)
    after = replace(
        run,
        task=replace(run.task, detection=more),
        student=replace(run.student, init=str(tmp_path / "run")),
    )
    job = DetectionJob(after)
    job.weights = sources_of(job_of)
    task = job.make_task()
    before = {name: tensor.detach().clone() for name, tensor in task.named_parameters()}
    weights = dict(job.initial_weights())
    del weights["student"]
    for module, tensors in weights.items():
        load_weights(getattr(task, module), tensors, where=module)
    for name, tensor in task.named_parameters():
        of_classes = any(f"{layer}." in name for layer in ("classes", "boxes", "masks"))
        new = of_classes or ("mask" in name and not masks) or name.startswith("student.")
        assert tensor.equal(before[name] if new else own[name]), name

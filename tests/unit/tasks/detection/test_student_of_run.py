"""The folder of a detection run as a source of weights: its student, without pyramid and heads."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from detection_batches import narrow_run
from stored_run import store_tensors

from fd_large.backbones.registry import build
from fd_large.cli.export import export
from fd_large.engine.checkpoint_models import sources_of
from fd_large.engine.student import student_weights
from fd_large.engine.zero.partition import load_weights
from fd_large.errors import ConfigError
from fd_large.tasks.dense.stages import LEFT_OUT
from fd_large.tasks.detection.job import DetectionJob
from fd_large.tasks.jobs import job_of

SWIN, VIT = "coco_mask_rcnn_swinv2_giant", "coco_mask_rcnn_vit_base"


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
    load_weights(
        second.student,
        student_weights(again.student, sources, without=LEFT_OUT),
        where="--student.init",
    )
    for key, parameter in second.student.named_parameters():
        assert torch.equal(parameter, tensors[f"student.{key}"]), key
    # Whoever wants the whole model gets a final norm that only normalises, and a class token of 0.
    net = build(again.student.model, again.student.architecture)
    weights = sources.open(tmp_path)
    shapes = {key: tuple(p.shape) for key, p in net.named_parameters()}
    assert weights.shapes() == shapes
    for key, value in (("norm.weight", 1.0), ("norm.bias", 0.0), ("cls_token", 0.0)):
        if key in shapes:
            assert (weights.file[key] == value).all()


def test_a_detector_is_not_exported_as_a_distilled_student(tmp_path):
    recipe = narrow_run(VIT).to_dict()
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ConfigError, match="of the task detection"):
        export(str(tmp_path), str(tmp_path / "out"), "timm")

"""Measures the k-NN accuracy of the student's features during a distillation."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import IMAGENET
from fd_large.data.labelled import LabelledImages
from fd_large.engine.evaluation import Evaluation, Panel, evaluating
from fd_large.engine.zero.engine import Engine
from fd_large.probes import knn
from fd_large.probes.features import extract
from fd_large.ranks import activity, distributed


def knn_accuracy(
    engine: Engine,
    train_set: LabelledImages,
    test_set: LabelledImages,
    folder: Path,
    *,
    every: int,
    image_size: int,
    micro_batch_size: int,
    workers: int,
    max_pixels: int,
    blank_maps: Any,
) -> Evaluation:
    """Makes the evaluation that measures `test_knn`, the k-NN accuracy in per cent.

    Args:
        engine: The engine of the task.
        train_set: Labelled images, in which the neighbours are found.
        test_set: Labelled images, whose classes are predicted.
        folder: Folder for the features, which is removed after each evaluation.
        every: Number of steps between two evaluations.
        image_size: Side of the images, in pixels.
        micro_batch_size: Number of images of a forward.
        workers: Number of loading processes of a rank.
        max_pixels: Number of pixels above which an image counts as unusable.
        blank_maps: Zeros shaped like the stored maps of an image, or None if no cache is read.
    """

    def measure(
        step: int, last: bool, between: Callable[[], None]
    ) -> tuple[dict[str, float], Panel | None]:
        features = {}
        splits = (("train", train_set), ("test", test_set))
        with evaluating(engine), activity.work("k-NN"):
            for name, images in activity.counted(splits, "features of train and test", "parts"):
                (features[name],) = extract(
                    _student_of(engine, blank_maps),
                    IMAGENET,
                    images,
                    folder / name,
                    image_size=image_size,
                    batch_size=micro_batch_size,
                    workers=workers,
                    max_pixels=max_pixels,
                    between=between,
                )
        predicted = knn.classify(
            features["train"],
            features["test"],
            num_classes=len(train_set.classes),
            between=between,
        )
        accuracy = features["test"].percent(predicted)
        distributed.barrier()
        if distributed.is_main():
            shutil.rmtree(folder, ignore_errors=True)
        return {"test_knn": accuracy}, None

    return Evaluation(measure, every)


def _student_of(engine: Engine, blank_maps: Any) -> Callable[[Tensor], FeatureMap]:
    """Returns a function from normalised pixels (B, 3, S, S) to the student's map.

    The function runs a forward of the whole task, since only the task's engine all-gathers the
    student's shards. At the first call the teachers run once, on a black image. In all forwards of
    the task, zeros of the same shapes stand for the teachers' maps.

    Args:
        engine: The engine of the task.
        blank_maps: Zeros shaped like the stored maps of an image, or None if no cache is read.
    """
    task = engine.task
    outputs: list[FeatureMap] = []
    maps: dict[str, FeatureMap] = {}

    def forward(pixels: Tensor) -> FeatureMap:
        if not maps:
            images = torch.zeros_like(pixels[:1], dtype=torch.uint8)
            blank = tree_map_only(Tensor, lambda part: part.to(images.device), blank_maps)
            maps.update(task.prepare(images, blank, None)["maps"])
        zeros = {
            name: map_._replace(tokens=torch.zeros_like(map_.tokens).expand(len(pixels), -1, -1))
            for name, map_ in maps.items()
        }
        handle = task.student.register_forward_hook(lambda _m, _i, output: outputs.append(output))
        try:
            engine.deepspeed(pixels=pixels, keep=None, maps=zeros)
        finally:
            handle.remove()
        return outputs.pop()

    return forward

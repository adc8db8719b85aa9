"""Narrow segmentations, and made-up batches, for tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from segmentation_twin import image_and_labels

from fd_large.data.loader import Batch
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import Run
from fd_large.tasks.dense.target import Targets
from fd_large.tasks.segmentation.data.labels import class_labels
from fd_large.tasks.segmentation.loss import IGNORED

NUM_CLASSES = 4
SWIN = Architecture(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4)
VIT = {"embed_dim": 16, "depths": (4,), "num_heads": (2,)}


def narrow_run(recipe: str, *, image_size: int = 64, **own: object) -> Run:
    """A recipe's shrunken twin: the same code path on a model of a few channels."""
    run = registry.get(recipe)
    is_vit = run.student_architecture().family == "vit"
    shape = replace(run.student.architecture, **VIT, patch_size=8) if is_vit else SWIN
    narrow = {"num_classes": NUM_CLASSES, "head_width": 8, "test_stride": 40}
    numbers = replace(run.task.segmentation, **(narrow | own))
    return replace(
        run,
        student=replace(run.student, architecture=shape),
        data=replace(run.data, image_size=image_size, workers=0),
        batch=replace(run.batch, global_batch_size=4, micro_batch_size=2),
        engine=replace(run.engine, precision="float32"),
        task=replace(run.task, segmentation=numbers),
    )


def batch_of(numbers: list[int], side: int = 64, *, ignored: bool = False) -> Batch:
    """Made images of four classes; the last one is smaller than its canvas."""
    images, labels = [], []
    for number in numbers:
        image, values = image_and_labels(number)
        images.append(torch.from_numpy(image[:side, :side].copy()).permute(2, 0, 1))
        of = class_labels(
            values[:side, :side],
            num_classes=NUM_CLASSES,
            ignore_value=255,
            reduce_zero_label=True,
            where=f"{number}",
        )
        labels.append(torch.from_numpy(of))
    sizes = torch.tensor([[side, side]] * len(numbers))
    sizes[-1] -= torch.tensor([8, 24])
    seen = torch.stack(labels)
    seen[-1, side - 8 :] = seen[-1, :, side - 24 :] = IGNORED
    if ignored:
        seen[:] = IGNORED
    positions = torch.tensor(numbers)
    targets = Targets(seen, sizes, np.array(numbers), 0)
    return Batch(torch.stack(images), 0, positions, positions, targets=targets)

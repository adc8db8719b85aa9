"""Narrow depth runs, and made-up batches, for tests."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from depth_images import image_and_depths

from fd_large.data.loader import Batch
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import Run
from fd_large.tasks.dense.target import Targets

SWIN = Architecture(
    embed_dim=8,
    depths=(1, 1, 2, 1),
    num_heads=(1, 1, 2, 2),
    window_size=4,
    pretrained_window_sizes=(3, 3, 3, 2),
)
SMALL = {"head_width": 8, "test_crop": "none"}
VIT = {"embed_dim": 16, "depths": (4,), "num_heads": (2,)}


def narrow_run(recipe: str, **own: object) -> Run:
    """A recipe's shrunken twin: the same code path on a model of a few channels."""
    run = registry.get(recipe)
    is_vit = run.student_architecture().family == "vit"
    shape = replace(run.student.architecture, **VIT, patch_size=16) if is_vit else SWIN
    student = replace(run.student, architecture=shape)
    if not is_vit:
        student = replace(student, stage_windows=(4, 4, 4, 2))
    return replace(
        run,
        student=student,
        data=replace(run.data, image_size=64, workers=0),
        batch=replace(run.batch, global_batch_size=4, micro_batch_size=2),
        engine=replace(run.engine, precision="float32"),
        task=replace(run.task, depth=replace(run.task.depth, **SMALL | own)),
    )


def batch_of(numbers: list[int], *, unknown: bool = False) -> Batch:
    """Made images with depths; none of them has one where they are `unknown`."""
    made = [image_and_depths(number, 64, 64) for number in numbers]
    images = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image, _ in made])
    depths = torch.stack([torch.from_numpy(depths) for _, depths in made])
    targets = Targets(
        depths * (not unknown), torch.tensor([[64, 64]] * len(made)), np.array(numbers), 0
    )
    positions = torch.tensor(numbers)
    return Batch(images, 0, positions, positions, targets=targets)

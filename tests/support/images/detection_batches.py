"""Made-up images with objects, and narrow detectors, for tests of detection."""

from __future__ import annotations

from dataclasses import replace

import torch

from fd_large.data.loader import Batch
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import Run
from fd_large.tasks.detection.data.target import Target, Targets

NUM_CLASSES = 5
NO_BOXES = torch.zeros(0, 4)
SWIN = Architecture(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 1, 2, 2), window_size=4)
VIT = Architecture(embed_dim=16, depths=(4,), num_heads=(2,), image_size=64)


def narrow_run(recipe: str, *, image_size: int = 96, **changes: object) -> Run:
    """A recipe's shrunken twin: the same code path on a model of a few channels."""
    run = registry.get(recipe)
    is_vit = run.student_architecture().family == "vit"
    return replace(
        run,
        student=replace(run.student, architecture=VIT if is_vit else SWIN),
        data=replace(run.data, image_size=image_size),
        batch=replace(run.batch, global_batch_size=4, micro_batch_size=2),
        engine=replace(run.engine, precision="float32"),
        task=replace(
            run.task,
            detection=replace(
                run.task.detection,
                num_classes=NUM_CLASSES,
                head_width=16,
                anchors_per_image=32,
                rois_per_image=16,
                proposals_per_image=50,
                test_size=(0, 0),
                semantic_classes=min(run.task.detection.semantic_classes, 9),
            ),
        ),
        **changes,
    )


def boxes(*rows: tuple[float, float, float, float]) -> torch.Tensor:
    """Boxes (n, 4) float32."""
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 4)


def target_of(
    generator: torch.Generator, height: int, width: int, objects: int, crowds: int = 0
) -> Target:
    """Rectangles of random place and class, filled but for a corner."""

    def drawn(count: int) -> torch.Tensor:
        sides = torch.tensor([width, height], dtype=torch.float32)
        corner = torch.rand(count, 2, generator=generator) * sides * 0.7
        extent = 2 + torch.rand(count, 2, generator=generator) ** 2 * sides * 0.6
        return torch.cat([corner, torch.minimum(corner + extent, sides)], dim=1)

    found = drawn(objects)
    masks = torch.zeros(objects, height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, found.int().tolist(), strict=True):
        mask[top : bottom + 1, left : right + 1] = 1
        mask[top : (top + bottom) // 2, left : (left + right) // 2] = 0
    labels = torch.randint(0, NUM_CLASSES, (objects,), generator=generator)
    return Target(found, labels, masks, drawn(crowds), 0)


def batch_of(
    seed: int, size: tuple[int, int], objects: list[int], crowds: list[int] | None = None
) -> Batch:
    """Noise with a bright rectangle at each object; the last image is smaller than its canvas."""
    generator = torch.Generator().manual_seed(seed)
    height, width = size
    images = torch.randint(
        0, 128, (len(objects), 3, height, width), generator=generator, dtype=torch.uint8
    )
    sizes = torch.tensor([[height, width]] * len(objects))
    sizes[-1] -= torch.tensor([height // 8, width // 8])
    targets = []
    for i, (count, crowd) in enumerate(zip(objects, crowds or [0] * len(objects), strict=True)):
        target = target_of(generator, *sizes[i].tolist(), count, crowd)
        masks = torch.zeros(count, height, width, dtype=torch.uint8)
        masks[:, : sizes[i, 0], : sizes[i, 1]] = target.masks
        images[i] += 100 * masks.amax(dim=0) if count else 0
        targets.append(target._replace(masks=masks, image_id=i))
    positions = torch.arange(len(objects)) + seed * len(objects)
    return Batch(
        images, 0, positions, positions, targets=Targets(targets, sizes, positions.numpy(), 0)
    )


def part_of(batch: Batch, start: int, stop: int) -> Batch:
    """Some images of a batch, as a rank has them."""
    part = slice(start, stop)
    of = batch.targets
    return Batch(
        batch.images[part],
        batch.epoch,
        batch.positions[part],
        batch.indices[part],
        targets=Targets(of.targets[part], of.sizes[part], of.positions[part], of.epoch),
    )

"""Rank program: detectors under ZeRO-3 against one process, and many batches of any content.

detection_ranks.py FOLDER BATCHES RUN ... writes, per rank: by recipe the losses of one process and
of the ranks' engine on the same global batches, with weights that learn from them; and of each RUN
for BATCHES random batches, on each rank others, the losses and how many boxes were found in
between.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from detection_batches import batch_of, narrow_run, part_of
from launch import write_result

from fd_large.data.loader import Batch
from fd_large.engine.forward_backward import forward_backward, prepared
from fd_large.engine.opening import engine_of
from fd_large.engine.zero import config as ds
from fd_large.engine.zero import partition, start
from fd_large.engine.zero.engine import Engine
from fd_large.engine.zero.optimizer import make_optimizer, parameter_groups, set_learning_rate
from fd_large.ranks import distributed
from fd_large.ranks.launch import find_launch
from fd_large.recipes.run import Run
from fd_large.tasks.detection import task
from fd_large.tasks.detection.heads import rpn
from fd_large.tasks.detection.job import DetectionJob

SWIN, VIT = "coco_mask_rcnn_swinv2_giant", "coco_mask_rcnn_vit_base"
UPDATES, SIZE = 3, (32, 48)
# Above four times the number of an image's anchors: at most a quarter of the boxes is for objects.
ALL = 2000
RATE = 1e-3
RATE_BESIDE_ONE_PROCESS = 1e-2
ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1_000_000}


def global_batch(update: int) -> Batch:
    """Four images, two batches in turn; in the first, rank 0's two images have no object.

    Among them are one without anything, and one with crowds alone.
    """
    objects = [0, 0, 3, 12] if update % 2 == 0 else [4, 0, 0, 7]
    batch = batch_of(100 + update % 2, SIZE, objects, crowds=[0, 2, 1, 0])
    with_stuff = [
        target._replace(semantic=torch.arange(6 * i, dtype=torch.uint8).view(-1, 6))
        for i, target in enumerate(batch.targets.targets)
    ]
    return replace(batch, targets=batch.targets._replace(targets=with_stuff))


def with_heads(run: Run, heads: str, **settings: Any) -> Run:
    """A run with other heads."""
    detection = replace(run.task.detection, heads=heads, **settings)
    return replace(run, task=replace(run.task, detection=detection))


def without_choice(run: Run) -> Run:
    """A run in which rounding decides nothing: every anchor is a proposal, and all are taken.

    And Adam divides by the size of a gradient: where that is all rounding, its step would be as
    large as any. Beside a large eps it stays small.
    """
    detection = replace(run.task.detection, proposals_per_image=ALL, rois_per_image=ALL)
    return replace(
        run,
        task=replace(run.task, detection=detection),
        optim=replace(run.optim, eps=1e-3),
    )


@contextmanager
def anchors_as_proposals() -> Iterator[None]:
    """Proposals that do not hang on the weights, by which one could be for an object or not.

    Whether a box that is learnt overlaps an object by a half, or another box by so much that one of
    the two goes, may be decided by its last bit. All boxes of images as small as these are pooled
    from one level.
    """

    def propose(logits: Any, deltas: Any, *rest: Any, **named: Any) -> Any:
        return own(logits, [torch.zeros_like(delta) for delta in deltas], *rest, **named)

    own, most, task.propose, rpn.NMS_IOU = task.propose, rpn.NMS_IOU, propose, 1.0
    try:
        yield
    finally:
        task.propose, rpn.NMS_IOU = own, most


def losses_of_one_process(run: Run) -> list[float]:
    """Plain torch, whole batches."""
    detector = partition.build(
        DetectionJob(run).make_task, {}, partitioned=False, seed=run.runtime.seed
    )
    optimizer = make_optimizer(
        parameter_groups(detector, run.optim.weight_decay), run.optim, on_gpu=False
    )
    losses = []
    for update in range(UPDATES):
        loss, _ = detector(**prepared(detector, global_batch(update), run.runtime.seed))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), run.optim.clip_norm)
        set_learning_rate(optimizer, RATE_BESIDE_ONE_PROCESS)
        optimizer.step()
        losses.append(loss.item())
    return losses


def start_engine(run: Run) -> Engine:
    """The run's detector under ZeRO-3, every parameter in pieces."""
    numbers = ds.RunNumbers(
        micro_batch_size=2,
        accumulation=1,
        world_size=distributed.world_size(),
        node_size=distributed.world_size(),
        clip_norm=run.optim.clip_norm,
        bfloat16=False,
        parameter_sizes=(1,),
    )
    engine = engine_of(
        run, DetectionJob(run).make_task, ds.fill({"zero_optimization": ZERO3}, numbers)
    )
    engine.task.train()
    return engine


def losses_of_ranks(run: Run) -> list[float]:
    """The same in the engine, two images a rank."""
    engine, first = start_engine(run), 2 * distributed.rank()
    losses = []
    for update in range(UPDATES):
        set_learning_rate(engine.deepspeed.optimizer, RATE_BESIDE_ONE_PROCESS)
        batch = part_of(global_batch(update), first, first + 2)
        loss = forward_backward(engine, batch, run.runtime.seed)
        engine.deepspeed.step()
        losses.append((distributed.sum_tensor(loss) / distributed.world_size()).item())
    forget(engine)
    return losses


def random_batches(run: Run, count: int) -> dict[str, Any]:
    """Batches of 0 to 50 objects an image, in any order; now and then boxes are looked for."""
    engine, rank = start_engine(run), distributed.rank()
    generator = torch.Generator().manual_seed(7 + rank)
    losses, found = [], 0
    for number in range(count):
        objects, crowds = (
            torch.randint(0, most, (2,), generator=generator).tolist() for most in (51, 3)
        )
        if torch.rand((), generator=generator) < 0.3:
            objects = [0, 0]
        batch = batch_of(1000 * (rank + 1) + number, (64, 64), objects, crowds)
        set_learning_rate(engine.deepspeed.optimizer, RATE)
        losses.append(forward_backward(engine, batch, run.runtime.seed).item())
        engine.deepspeed.step()
        if number % 8 == 0:
            engine.task.eval()
            # On one rank nothing is large enough to hold an object.
            sizes = batch.targets.sizes if rank else torch.zeros_like(batch.targets.sizes)
            with torch.no_grad():
                seen = engine.task.see(batch.images, sizes)
            found += sum(len(of.boxes) for of in seen)
            engine.task.train()
    forget(engine)
    return {"losses": losses, "found": found}


def forget(engine: Engine) -> None:
    """Frees what an engine holds."""
    engine.deepspeed.destroy()
    start.forget_engines()
    gc.collect()


def main(folder: Path, batches: int, at_random: list[str]) -> None:
    runs = {name: narrow_run(name) for name in (SWIN, VIT)}
    # CLIP's own model, whose position embedding no module but the whole model owns.
    clip = replace(runs[VIT].student, model="clip_vit_base_patch16")
    runs["clip"] = with_heads(replace(runs[VIT], student=clip), "cascade")
    runs[VIT] = with_heads(runs[VIT], "cascade", cascade_form="detectron2", box_loss="l1")
    runs["htc"] = with_heads(
        runs[SWIN], "htc", box_loss="giou", semantic_classes=18, extra_attention=True
    )
    # Before the ranks meet: one rank does some runs, and the other one the others.
    mine = list(runs)[find_launch(os.environ).rank :: 2]
    with anchors_as_proposals():
        alone = {name: losses_of_one_process(without_choice(runs[name])) for name in mine}
        distributed.start()
        start.start()
        alone = {k: v for part in distributed.gather_objects(alone) for k, v in part.items()}
        result: dict[str, Any] = {
            name: {"alone": alone[name], "together": losses_of_ranks(without_choice(run))}
            for name, run in runs.items()
        }
    result["random"] = {name: random_batches(runs[name], batches) for name in at_random}
    write_result(folder, result)
    distributed.barrier()


if __name__ == "__main__":
    folder, batches, *at_random = sys.argv[1:]
    main(Path(folder), int(batches), at_random)

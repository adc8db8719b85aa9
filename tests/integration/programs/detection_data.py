"""Rank program: COCO's images over ranks, in training and in evaluation.

detection_data.py FOLDER ROOT writes, per rank: of the first steps of an epoch under both kinds of
jitter the samples by position; and what an evaluation of the ranks' own loaders comes to, whose
detections are the objects themselves, moved by a pixel or two where the image id is odd.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import torch
from launch import write_result

from fd_large.data.image_header import MAX_PIXELS
from fd_large.data.sampler import Portion
from fd_large.ranks import distributed
from fd_large.tasks.detection.data.annotations import CocoSet, open_coco
from fd_large.tasks.detection.data.loader import build_evaluation_loader, build_training_loader
from fd_large.tasks.detection.data.views import LargeScaleJitter, ShortestEdge
from fd_large.tasks.detection.heads.selection import Detections
from fd_large.tasks.detection.scores.collect import keep_shard, to_results
from fd_large.tasks.detection.scores.evaluation import scoring_of
from fd_large.tasks.detection.scores.results import read_results
from fd_large.tasks.detection.scores.score_shards import Note

JITTERS = {"fixed": LargeScaleJitter(64), "aspect": ShortestEdge(40, 60, 90)}


def training(pictures: CocoSet) -> dict[str, dict[str, str]]:
    """By jitter and position a hash of the unpadded image and its target."""
    found: dict[str, dict[str, str]] = {}
    for name, jitter in JITTERS.items():
        loader = build_training_loader(
            pictures,
            jitter,
            Portion(2, 1, 2, distributed.rank(), distributed.world_size()),
            seed=5,
            global_batch_size=4,
            workers=0,
        )
        samples = found[name] = {}
        for batch in loader:
            for place, target in enumerate(batch.targets.targets):
                height, width = batch.targets.sizes[place].tolist()
                digest = hashlib.sha256(batch.images[place, :, :height, :width].numpy().tobytes())
                digest.update(target.masks[:, :height, :width].numpy().tobytes())
                for part in (target.boxes, target.labels, target.crowd_boxes):
                    digest.update(part.numpy().tobytes())
                samples[str(int(batch.positions[place]))] = digest.hexdigest()
    return found


def evaluation(pictures: CocoSet, folder: Path) -> dict[str, Any]:
    """Batches of this rank, and on rank 0 the boxes' numbers and the order of the results."""
    loader = build_evaluation_loader(
        pictures,
        sides=[(100, 160)],
        batch_size=5,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=0,
    )
    results = []
    for batch in loader:
        for place, index in enumerate(batch.indices.tolist()):
            if not batch.weights[place]:
                continue
            objects = pictures.objects(index)
            boxes = torch.from_numpy(objects.boxes) + objects.image_id % 2 * 1.5
            count = len(boxes)
            results += to_results(
                Detections(
                    boxes,
                    torch.full((count,), 0.75),
                    torch.from_numpy(objects.labels),
                    torch.ones(count, 28, 28),
                ),
                image_id=objects.image_id,
                original_size=batch.original_sizes[place],
                category_ids=pictures.category_ids,
            )
    keep_shard(results, folder, Note(distributed.world_size(), 0, ""))
    found: dict[str, Any] = {"batches": len(loader), "own": len(results)}
    scoring = scoring_of(pictures, folder, draw=False, max_pixels=MAX_PIXELS)
    found["numbers"] = scoring.wait(lambda: None)
    scoring.forget()
    if distributed.is_main():
        merged = read_results(folder / "results.json")
        found["image_ids"] = [result["image_id"] for result in merged]
        found["left"] = [path.name for path in folder.glob("results_*")]
    return found


def main() -> None:
    folder, root = Path(sys.argv[1]), sys.argv[2]
    distributed.start()
    found = {
        "training": training(open_coco(root, "train")),
        "evaluation": evaluation(open_coco(root, "val"), folder),
    }
    write_result(folder, found)
    distributed.barrier()
    distributed.stop()


if __name__ == "__main__":
    main()

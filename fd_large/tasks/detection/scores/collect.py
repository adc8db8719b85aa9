"""What a model saw in resized images, as results on the pictures' own pixels; ranks to one list."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fd_large import distributed
from fd_large.tasks.detection.data import masks
from fd_large.tasks.detection.heads.inference import Detections, paste
from fd_large.tasks.detection.scores.results import Result, merge, read_results, write_results

# Masks of an image that lie on its pixels at once: a hundred would fill memory on large ones.
MASKS_AT_ONCE = 10


def to_results(
    seen: Detections,
    *,
    image_id: int,
    size: Tensor | Sequence[int],
    original_size: Tensor | Sequence[int],
    category_ids: Sequence[int],
) -> list[Result]:
    """Detections of one image in COCO's format.

    Args:
        seen: In the image's pixels.
        image_id: The data set's number of the image.
        size: Height and width of the image without its padding.
        original_size: Height and width of the image.
        category_ids: The data set's number of each label.
    """
    (height, width), (original_height, original_width) = map(_whole, (size, original_size))
    scale = torch.tensor([original_width / width, original_height / height] * 2)
    limit = torch.tensor([original_width, original_height] * 2)
    boxes = torch.minimum((seen.boxes.float().cpu() * scale).clamp(min=0), limit)
    pasted: list[dict] = []
    for some, probabilities in zip(
        boxes.split(MASKS_AT_ONCE), seen.masks.float().cpu().split(MASKS_AT_ONCE), strict=True
    ):
        on_image = paste(probabilities, some, original_height, original_width)
        pasted += masks.encode(on_image.numpy().astype(np.uint8))
    sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    return [
        {
            "image_id": image_id,
            "category_id": int(category_ids[label]),
            # A thousandth of a pixel: a third of the file's length otherwise.
            "bbox": [round(side, 3) for side in box],
            "score": score,
            "segmentation": segmentation,
        }
        for box, label, score, segmentation in zip(
            sides.tolist(), seen.labels.tolist(), seen.scores.tolist(), pasted, strict=True
        )
    ]


def gather(results: Sequence[Result], folder: Path) -> list[Result] | None:
    """Makes one list of all ranks' results, on rank 0; a collective.

    Through files, one a rank: masks of thousands of images would go to every rank otherwise.

    Args:
        results: This rank's.
        folder: That all ranks see; the files are removed again.

    Returns: the merged list on rank 0, None on the others.
    """
    own = _shard(folder, distributed.rank())
    write_results(own, results)
    distributed.barrier()
    if not distributed.is_main():
        return None
    shards = [_shard(folder, rank) for rank in range(distributed.world_size())]
    merged = merge(read_results(shard) for shard in shards)
    # Those that an evaluation on more ranks left, which was killed here, as well.
    for shard in folder.glob(_shard(folder, "*").name + "*"):
        shard.unlink()
    return merged


def _shard(folder: Path, rank: int | str) -> Path:
    return folder / f"results_of_rank_{rank}.json"


def _whole(size: Tensor | Sequence[int]) -> tuple[int, int]:
    height, width = (int(side) for side in size)
    return height, width

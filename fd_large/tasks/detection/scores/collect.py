"""Converts detections to COCO's results format, and writes the results of a rank to a file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.errors import DataError
from fd_large.files import write_json
from fd_large.ranks import distributed
from fd_large.tasks.detection.data import masks
from fd_large.tasks.detection.heads.selection import Detections
from fd_large.tasks.detection.scores.results import Result, shard_of, write_results
from fd_large.tasks.detection.scores.score_shards import NOTE, Note

# Number of an image's masks that are pasted at once; a hundred would fill the memory.
MASKS_AT_ONCE = 10
MASK_THRESHOLD = 0.5


def to_results(
    detections: Detections,
    *,
    image_id: int,
    original_size: Tensor | Sequence[int],
    category_ids: Sequence[int],
) -> list[Result]:
    """Converts the detections in an image to COCO's results format.

    Args:
        detections: Detections in pixels of the original image.
        image_id: The image's id in the dataset.
        original_size: Height and width of the original image.
        category_ids: For each label, the category's id in the dataset.
    """
    height, width = (int(side) for side in original_size)
    limit = torch.tensor([width, height] * 2)
    boxes = torch.minimum(detections.boxes.float().cpu().clamp(min=0), limit)
    pasted: list[dict] = []
    for some, probabilities in zip(
        boxes.split(MASKS_AT_ONCE), detections.masks.float().cpu().split(MASKS_AT_ONCE), strict=True
    ):
        on_image = paste(probabilities, some, height, width)
        pasted += masks.encode(on_image.numpy().astype(np.uint8))
    sides = torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1)
    return [
        {
            "image_id": image_id,
            "category_id": int(category_ids[label]),
            # Rounded to a thousandth of a pixel; further digits would be a third of the file.
            "bbox": [round(side, 3) for side in box],
            "score": score,
            "segmentation": segmentation,
        }
        for box, label, score, segmentation in zip(
            sides.tolist(),
            detections.labels.tolist(),
            detections.scores.tolist(),
            pasted,
            strict=True,
        )
    ]


def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Resizes masks to their boxes and places them in an image.

    Args:
        masks: (n, M, M) float32, mask probabilities on a grid over each box.
        boxes: (n, 4) float32: left, top, right, bottom in pixels of the image.
        height: Height of the image.
        width: Width of the image.

    Returns: (n, height, width) bool, True where the probability is at least `MASK_THRESHOLD`.
    """
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool, device=masks.device)
    limit = boxes.new_tensor([width, height, width, height])
    # Whole pixels that a box touches: nothing is computed for the others.
    corners = torch.cat([boxes[:, :2].floor(), boxes[:, 2:].ceil()], dim=1).clamp(min=0)
    for i, edges in enumerate(torch.minimum(corners, limit).int().tolist()):
        left, top, right, bottom = edges
        if right <= left or bottom <= top:
            continue
        x = _places(left, right, boxes[i, 0], boxes[i, 2])
        y = _places(top, bottom, boxes[i, 1], boxes[i, 3])
        grid = torch.stack([x[None].expand(len(y), -1), y[:, None].expand(-1, len(x))], dim=-1)
        values = F.grid_sample(masks[i][None, None], grid[None], align_corners=False)
        pasted[i, top:bottom, left:right] = values[0, 0] >= MASK_THRESHOLD
    return pasted


def _places(start: int, stop: int, low: Tensor, high: Tensor) -> Tensor:
    """Returns the positions of pixel centres relative to a box along one axis, for `grid_sample`.

    Args:
        start: Index of the first pixel along the axis.
        stop: Index of the last pixel, plus 1.
        low: Left or upper edge of the box in pixels, a scalar; it gets the coordinate -1.
        high: Right or lower edge of the box in pixels, a scalar; it gets the coordinate 1.

    Returns: (stop - start,), the coordinate of each pixel's centre, -1 to 1 inside the box.
    """
    centres = torch.arange(start, stop, device=low.device, dtype=low.dtype) + 0.5
    return (centres - low) / (high - low) * 2 - 1


def keep_shard(results: Sequence[Result], folder: Path, note: Note) -> None:
    """Writes this rank's results to a file; rank 0 also writes the note. All ranks must call it.

    Results go through a file for each rank, since an all-gather would send the masks of thousands
    of images to every rank.

    Args:
        results: This rank's results.
        folder: A folder on storage that all ranks share.
        note: Facts about the results of all ranks. Its file marks the folder as not yet scored.

    Raises: DataError: on every rank, if a rank cannot write its file.
    """

    def write(path: Path, do: Callable[[Path], None]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            do(path)
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written; got {error}, expected room for the detections of the "
                "evaluation. Make room, and start the same command again: it repeats the "
                "evaluation first."
            ) from error

    shard = shard_of(folder, distributed.rank())
    distributed.together(lambda: write(shard, lambda path: write_results(path, results)))

    def write_note() -> None:
        if distributed.is_main():
            write(folder / NOTE, lambda path: write_json(path, note._asdict()))

    # Written after all shards, since a later start scores every folder with a note.
    distributed.together(write_note)

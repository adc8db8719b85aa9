"""From the heads' numbers to what was seen: boxes, scores, classes, masks.

Sources: Ren et al., arXiv 1506.01497; He et al., arXiv 1703.06870.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import batched_nms

from fd_large.tasks.detection.heads.rpn import cut_to

LEAST_SCORE = 0.05
NMS_IOU = 0.5
MASK_THRESHOLD = 0.5


class Detections(NamedTuple):
    """What was seen in one image, best first.

    Attributes:
        boxes: (n, 4) float32, left, top, right, bottom in pixels.
        scores: (n,) float32, 0 to 1.
        labels: (n,) int64, 0 to K - 1.
        masks: (n, M, M) float32, probabilities over each box; `paste` puts them on pixels.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor


def select(
    boxes: Tensor, scores: Tensor, size: Tensor, *, at_most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses among the boxes of an image.

    Args:
        boxes: (R, K, 4) float32, one for each class.
        scores: (R, K) float32.
        size: (2,), height and width of the image without its padding.
        at_most: Boxes returned.

    Returns: boxes (n, 4), scores (n,), labels (n,), best first.
    """
    cut = cut_to(boxes.flatten(0, 1)[None], size[None])[0].view_as(boxes)
    whole = ((cut[..., 2:] - cut[..., :2]).amin(dim=-1) > 0) & (scores > LEAST_SCORE)
    row, label = torch.where(whole)
    box, score = cut[row, label], scores[row, label]
    kept = batched_nms(box, score, label, NMS_IOU)[:at_most]
    return box[kept], score[kept], label[kept]


def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> Tensor:
    """Puts masks of boxes on an image's pixels.

    Args:
        masks: (n, M, M) float32, probabilities over each box.
        boxes: (n, 4) float32, in pixels of the image.
        height: Of the image.
        width: Of the image.

    Returns: (n, height, width) bool.
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
    """Where the centres of pixels lie in a box, from -1 at its one edge to 1 at the other."""
    centres = torch.arange(start, stop, device=low.device, dtype=low.dtype) + 0.5
    return (centres - low) / (high - low) * 2 - 1


def with_one(boxes: Sequence[Tensor]) -> list[Tensor]:
    """Gives a batch without boxes one that means nothing, on the first image, or nothing.

    All ranks must call the same modules, and no library promises a head's gradients on no boxes.
    """
    if any(len(b) for b in boxes):
        return list(boxes)
    return [boxes[0].new_tensor([[0.0, 0.0, 1.0, 1.0]]), *boxes[1:]]

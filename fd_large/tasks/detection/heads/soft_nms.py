"""Soft NMS, in which a selected box lowers the scores of overlapping boxes of its class.

A detector reports only the best few boxes of an image. Boxes of all classes are therefore selected
together in the order of their scores, until `at_most` are selected. A loop for each class would go
through tens of thousands of pairs of box and class.

Source: Bodla et al., arXiv 1704.04503, as in mmcv (mmcv/ops/nms.py, v2.1.0).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import box_iou

Decay = Literal["linear", "gaussian"]


@torch.no_grad()
def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    *,
    at_most: int,
    decay: Decay = "linear",
    iou: float = 0.5,
    sigma: float = 0.5,
    least_score: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Selects boxes one by one by score, and lowers the scores of boxes that overlap them.

    Args:
        boxes: (N, 4) float32, left, top, right, bottom.
        scores: (N,) float32.
        labels: (N,) int64, classes; a selected box lowers scores in its own class only.
        at_most: Largest number of selected boxes.
        decay: Factor by which a score is multiplied, given its box's IoU with a selected box:
            "linear" is 1 - IoU if the IoU is at least `iou`, else 1; "gaussian" is
            exp(-IoU^2 / sigma).
        iou: Smallest IoU at which the linear decay lowers a score.
        sigma: Width of the gaussian decay.
        least_score: Boxes with lower scores are never selected.

    Returns: the indices of the selected boxes, (n,) int64 in the order of selection, and their
        scores when they were selected, (n,).
    """
    # Boxes are sorted by class, so that a selection changes only a slice of the scores.
    labels, order = labels.sort(stable=True)
    boxes, left = boxes[order], scores[order].clone()
    counts = torch.unique_consecutive(labels, return_counts=True)[1].tolist()
    of_class = list(zip(boxes.split(counts), left.split(counts), strict=True)) if counts else []
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    best = torch.stack([of.max() for _, of in of_class]) if of_class else left
    chosen, lowered = [], []
    for _ in range(min(at_most, len(left))):
        number = int(best.argmax())
        if best[number] < least_score:
            break
        class_boxes, class_scores = of_class[number]
        place = class_scores.argmax()
        chosen.append(starts[number] + place)
        lowered.append(class_scores[place].clone())
        overlap = box_iou(class_boxes[place][None], class_boxes)[0]
        if decay == "gaussian":
            class_scores *= torch.exp(-(overlap**2) / sigma)
        else:
            class_scores *= torch.where(overlap >= iou, 1 - overlap, 1)
        class_scores[place] = -1
        best[number] = class_scores.max()
    if not chosen:
        return order[:0], left[:0]
    return order[torch.stack(chosen)], torch.stack(lowered)

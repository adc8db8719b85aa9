"""Selection of the boxes that a detector reports: non-maximum suppression and a limit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from fd_large.tasks.detection.heads.rpn import cut_to
from fd_large.tasks.detection.heads.soft_nms import soft_nms

MASK_THRESHOLD = 0.5


class Detections(NamedTuple):
    """The detections in one image, best first.

    Attributes:
        boxes: (n, 4) float32, left, top, right, bottom in pixels.
        scores: (n,) float32, 0 to 1.
        labels: (n,) int64, 0 to K - 1.
        masks: (n, M, M) float32, probabilities over each box.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor


class Chosen(NamedTuple):
    """The selected boxes of an image, best first, before their masks are made.

    Attributes:
        boxes: (n, 4) float32.
        scores: (n,) float32.
        labels: (n,) int64.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The rule for selecting boxes.

    Attributes:
        nms: "hard" drops boxes that overlap a better box of their class by more than `iou`;
            "linear" and "gaussian" lower their scores (`soft_nms`).
        iou: IoU above which hard drops a box, and from which linear lowers its score.
        least_score: Boxes with this score or less are no detections.
        at_most: Largest number of boxes of an image.
        rescored: Whether a score is multiplied by the mean probability inside its mask.
    """

    nms: Literal["hard", "linear", "gaussian"] = "hard"
    iou: float = 0.5
    least_score: float = 0.05
    at_most: int = 100
    rescored: bool = False

    def of_candidates(self, boxes: Tensor, scores: Tensor, size: Tensor) -> Chosen:
        """Selects the detections of an image from the boxes of its R proposals in K classes.

        Args:
            boxes: (R, K, 4) float32, a box for each class, or (R, 1, 4).
            scores: (R, K) float32.
            size: (2,), height and width of the image without its padding, to which boxes are
                clipped.
        """
        cut = cut_to(boxes.flatten(0, 1)[None], size[None])[0].view_as(boxes)
        whole = (cut[..., 2:] - cut[..., :2]).amin(dim=-1) > 0
        row, label = torch.where(whole & (scores > self.least_score))
        column = label if boxes.shape[1] > 1 else torch.zeros_like(label)
        return self.of_boxes(cut[row, column], scores[row, label], label)

    def of_boxes(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Chosen:
        """Chooses among boxes (N, 4) with scores (N,) and labels (N,)."""
        if self.nms == "hard":
            selected = batched_nms(boxes, scores, labels, self.iou)[: self.at_most]
            scores = scores[selected]
        else:
            selected, scores = soft_nms(
                boxes, scores, labels, at_most=self.at_most, decay=self.nms, iou=self.iou
            )
        return Chosen(boxes[selected], scores, labels[selected])

    def detections(self, chosen: Chosen, masks: Tensor) -> Detections:
        """Joins the selected boxes and their masks (n, M, M), best first."""
        if not self.rescored:
            return Detections(*chosen, masks)
        scores, order = rescored(chosen.scores, masks).sort(descending=True, stable=True)
        return Detections(chosen.boxes[order], scores, chosen.labels[order], masks[order])


def rescored(scores: Tensor, masks: Tensor) -> Tensor:
    """Returns scores times the mean probability inside their masks; 0 for empty masks.

    Args:
        scores: (n,) float32.
        masks: (n, M, M) float32, probabilities.

    Source: "maskness" in baaivision/EVA (EVA-02/det/detectron2/modeling/roi_heads).
    """
    inside = (masks > MASK_THRESHOLD).to(masks.dtype)
    return scores * (masks * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp(min=1)

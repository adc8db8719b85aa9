"""Selects the boxes that a detector reports, by non-maximum suppression, up to a largest number."""

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
    """The detections in one image, by falling score.

    Attributes:
        boxes: (n, 4) float32: left, top, right, bottom in pixels.
        scores: (n,) float32, 0 to 1.
        labels: (n,) int64, the class of each box, counted from 0.
        masks: (n, M, M) float32, mask probabilities on a grid of M x M cells over each box.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor


class Chosen(NamedTuple):
    """The selected boxes of an image, by falling score, before their masks are predicted.

    Attributes:
        boxes: (n, 4) float32: left, top, right, bottom in pixels.
        scores: (n,) float32, 0 to 1.
        labels: (n,) int64, the class of each box, counted from 0.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The settings by which the reported boxes are selected.

    Attributes:
        nms: "hard" drops a box that overlaps a selected box of its class by more than `iou`;
            "linear" and "gaussian" lower the scores of overlapping boxes (`soft_nms`).
        iou: IoU above which "hard" drops a box, and from which "linear" lowers its score.
        least_score: Boxes with this score or less are dropped before NMS.
        at_most: Largest number of boxes of an image.
        rescored: Whether a box's score is multiplied by the mean probability inside its mask.
    """

    nms: Literal["hard", "linear", "gaussian"] = "hard"
    iou: float = 0.5
    least_score: float = 0.05
    at_most: int = 100
    rescored: bool = False

    def of_candidates(self, boxes: Tensor, scores: Tensor, size: Tensor) -> Chosen:
        """Selects the detections of an image from the boxes of its R proposals in K classes.

        Args:
            boxes: (R, K, 4) float32, a box for each class, or (R, 1, 4), a box for all classes:
                left, top, right, bottom in pixels.
            scores: (R, K) float32, the probability of each class, 0 to 1.
            size: (2,), height and width of the image without its padding, to which boxes are
                clipped.
        """
        cut = cut_to(boxes.flatten(0, 1)[None], size[None])[0].view_as(boxes)
        whole = (cut[..., 2:] - cut[..., :2]).amin(dim=-1) > 0
        row, label = torch.where(whole & (scores > self.least_score))
        column = label if boxes.shape[1] > 1 else torch.zeros_like(label)
        return self.of_boxes(cut[row, column], scores[row, label], label)

    def of_boxes(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Chosen:
        """Selects boxes of an image by NMS, at most as many as the field `at_most` says.

        Args:
            boxes: (N, 4): left, top, right, bottom.
            scores: (N,), 0 to 1.
            labels: (N,) int64, the class of each box; boxes of different classes do not interact.
        """
        if self.nms == "hard":
            selected = batched_nms(boxes, scores, labels, self.iou)[: self.at_most]
            scores = scores[selected]
        else:
            selected, scores = soft_nms(
                boxes, scores, labels, at_most=self.at_most, decay=self.nms, iou=self.iou
            )
        return Chosen(boxes[selected], scores, labels[selected])

    def detections(self, chosen: Chosen, masks: Tensor) -> Detections:
        """Combines selected boxes and their masks into detections, by falling score.

        If the field `rescored` is True, each score is first multiplied by the mean probability
        inside the mask.

        Args:
            chosen: The n selected boxes.
            masks: (n, M, M) float32, mask probabilities on a grid over each box.
        """
        if not self.rescored:
            return Detections(*chosen, masks)
        scores, order = rescored(chosen.scores, masks).sort(descending=True, stable=True)
        return Detections(chosen.boxes[order], scores, chosen.labels[order], masks[order])


def rescored(scores: Tensor, masks: Tensor) -> Tensor:
    """Multiplies the score of each box by the mean probability inside its mask.

    The inside of a mask is where its probability exceeds `MASK_THRESHOLD`. The score of a box whose
    mask has no inside becomes 0.

    Args:
        scores: (n,) float32.
        masks: (n, M, M) float32, probabilities.

    Returns: (n,) float32, the new scores.
    Source: "maskness" in baaivision/EVA (EVA-02/det/detectron2/modeling/roi_heads).
    """
    inside = (masks > MASK_THRESHOLD).to(masks.dtype)
    return scores * (masks * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp(min=1)

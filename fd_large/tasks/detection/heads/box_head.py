"""The box head, which predicts the class and a refined box of each proposal.

Sources: Ren et al., arXiv 1506.01497; sizes as ViTDet's, Li et al., arXiv 2203.16527.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import box_area

from fd_large.backbones.initialization import Draw
from fd_large.backbones.layers import Linear
from fd_large.tasks.dense.convolution import NormedConvolution, at_least_float32, he_uniform
from fd_large.tasks.detection.data.target import Target
from fd_large.tasks.detection.heads import box_coder
from fd_large.tasks.detection.heads.matching import BACKGROUND, Sample, give_best, match, sample

BOX_SIDE = 7
NUM_CONVOLUTIONS = 4
POSITIVE_IOU = 0.5
POSITIVE_SHARE = 0.25
CODER = box_coder.DETECTRON2[0]
GIOU_WEIGHT, GIOU_EPS = 10, 1e-7

BoxLoss = Literal["l1", "smooth_l1", "giou"]


class BoxHead(nn.Module):
    """Head of four convolutions and a linear layer that predicts a proposal's class and box.

    Args:
        num_classes: Number of classes, K; index K stands for the background.
        width: Channels of the pyramid and the convolutions; the linear layer has four times as
            many.
        class_agnostic: True if a proposal has a single box for all classes, False if it has a box
            for each class.
    """

    def __init__(self, num_classes: int, width: int, *, class_agnostic: bool = False):
        super().__init__()
        self.convolutions = nn.Sequential(
            *(NormedConvolution(width, width, 3, relu=True) for _ in range(NUM_CONVOLUTIONS))
        )
        self.whole = Linear(width * BOX_SIDE**2, 4 * width, draw=he_uniform())
        self.classes = Linear(4 * width, num_classes + 1, draw=Draw("normal", std=0.01))
        num_boxes = 1 if class_agnostic else num_classes
        self.boxes = Linear(4 * width, 4 * num_boxes, draw=Draw("normal", std=0.001))

    def forward(self, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """Maps the pooled features of R proposals, (R, width, 7, 7), to classes and boxes.

        Returns: class logits (R, K + 1), and box deltas (R, K, 4), or (R, 1, 4) if class-agnostic;
            both float32.
        """
        x = F.relu(self.whole(self.convolutions(cuts).flatten(1)))
        deltas = at_least_float32(self.boxes(x)).unflatten(1, (-1, 4))
        return at_least_float32(self.classes(x)), deltas


class Sampled(NamedTuple):
    """The sampled proposals (rois) of a batch, with the objects that they match.

    N and P are the numbers of rois and of matched rois (positives) in the batch.

    Attributes:
        rois: (n, 4) float32 for each image: left, top, right, bottom in pixels; positives first.
        labels: (N,) int64, the class of each roi; K for background.
        objects: (p,) int64 for each image, the index of the object of each positive.
        boxes: (P, 4) float32, for each positive the box of its object: left, top, right, bottom.
        numbers: (n,) int64 for each image, the index of each roi in the list of the proposals
            followed by the boxes of the objects.
    """

    rois: list[Tensor]
    labels: Tensor
    objects: list[Tensor]
    boxes: Tensor
    numbers: list[Tensor]

    @property
    def positives(self) -> list[Tensor]:
        """For each image the rois that match an object, (p, 4): left, top, right, bottom."""
        return [roi[: len(of)] for roi, of in zip(self.rois, self.objects, strict=True)]

    @property
    def foreground(self) -> Tensor:
        """Indices of the positives among the rois of the whole batch, (P,) int64."""
        first, places = 0, []
        for roi, of in zip(self.rois, self.objects, strict=True):
            places.append(torch.arange(first, first + len(of), device=self.labels.device))
            first += len(roi)
        return torch.cat(places)


@torch.no_grad()
def sample_rois(
    proposals: Sequence[Tensor],
    targets: Sequence[Target],
    draws: NDArray,
    *,
    rois_per_image: int,
    num_classes: int,
    positive_iou: float = POSITIVE_IOU,
    best_for_each: bool = False,
) -> Sampled:
    """Samples proposals for the losses, after adding the boxes of the objects to the proposals.

    Args:
        proposals: (n, 4) float32 for each image: left, top, right, bottom in pixels; n may be 0.
        targets: The target of each image.
        draws: (B, 2 * rois_per_image) uniform random numbers in [0, 1).
        rois_per_image: Largest number of sampled proposals of an image.
        num_classes: Number of classes, K.
        positive_iou: Smallest IoU at which a proposal matches an object.
        best_for_each: Whether an object is matched to the proposal that overlaps it most, even if
            this proposal overlaps another object more (`give_best`).
    """
    parts = []
    for proposal, target, image_draws in zip(proposals, targets, draws, strict=True):
        # Early in training few proposals match an object.
        candidates = torch.cat([proposal, target.boxes])
        matched = _matched(candidates, target, positive_iou)
        if best_for_each:
            of_proposals = matched[: len(proposal)]
            give_best(of_proposals, target.boxes, proposal, positive_iou=positive_iou)
        chosen = sample(matched, rois_per_image, POSITIVE_SHARE, image_draws)
        parts.append((candidates, target, matched, chosen))
    return _sampled(parts, num_classes)


@torch.no_grad()
def match_rois(
    rois: Sequence[Tensor], targets: Sequence[Target], *, num_classes: int, positive_iou: float
) -> Sampled:
    """Matches all rois to objects without sampling, and drops unmatched rois inside crowds.

    Args:
        rois: (n, 4) float32 for each image: left, top, right, bottom in pixels; n may be 0.
        targets: The target of each image.
        num_classes: Number of classes, K.
        positive_iou: Smallest IoU at which a roi matches an object.
    """
    parts = []
    for roi, target in zip(rois, targets, strict=True):
        matched = _matched(roi, target, positive_iou)
        chosen = Sample(torch.where(matched >= 0)[0], torch.where(matched == BACKGROUND)[0])
        parts.append((roi, target, matched, chosen))
    return _sampled(parts, num_classes)


def _matched(candidates: Tensor, target: Target, positive_iou: float) -> Tensor:
    return match(
        target.boxes,
        target.crowd_boxes,
        candidates,
        positive_iou=positive_iou,
        negative_iou=positive_iou,
        best_for_each=False,
    )


def _sampled(parts: Sequence[tuple[Tensor, Target, Tensor, Sample]], num_classes: int) -> Sampled:
    """Joins the samples of the images into the `Sampled` of the batch.

    Args:
        parts: For each image its candidates (n, 4), its target, the result of `match` for the
            candidates, and the sampled indices of candidates.
        num_classes: Number of classes, K.
    """
    rois, labels, objects, boxes, numbers = [], [], [], [], []
    for candidates, target, matched, chosen in parts:
        numbers.append(torch.cat([chosen.positives, chosen.negatives]))
        rois.append(candidates[numbers[-1]])
        objects.append(matched[chosen.positives])
        background = torch.full_like(chosen.negatives, num_classes)
        labels += [target.labels[objects[-1]], background]
        boxes.append(target.boxes[objects[-1]])
    return Sampled(rois, torch.cat(labels), objects, torch.cat(boxes), numbers)


def most_sampled(images: int, rois_per_image: int, like: Tensor) -> Sampled:
    """Returns a sample of the largest possible size, all zeros, to count FLOPs and memory.

    Args:
        images: Number of images, B.
        rois_per_image: Number of rois of each image, of which the share `POSITIVE_SHARE` matches
            an object.
        like: A tensor on the device of the result, which may be the meta device.
    """
    positives = int(rois_per_image * POSITIVE_SHARE)
    boxes = like.new_zeros(images * rois_per_image, 4, dtype=torch.float32)
    labels = torch.zeros_like(boxes[:, 0], dtype=torch.int64)
    return Sampled(
        list(boxes.split(rois_per_image)),
        labels,
        [labels[:positives]] * images,
        boxes[: images * positives],
        list(labels.split(rois_per_image)),
    )


def deltas_of(deltas: Tensor, labels: Tensor) -> Tensor:
    """Returns for each of R rois the box deltas that belong to its class, (R, 4).

    Args:
        deltas: (R, K, 4), deltas for each of K classes, or (R, 1, 4), deltas for all classes.
        labels: (R,) int64, the class of each roi, 0 to K - 1.
    """
    if deltas.shape[1] == 1:
        return deltas[:, 0]
    return deltas[torch.arange(len(labels), device=deltas.device), labels]


def box_losses(
    logits: Tensor,
    deltas: Tensor,
    sampled: Sampled,
    *,
    coder: Any = CODER,
    box_loss: BoxLoss = "l1",
) -> tuple[Tensor, Tensor]:
    """Returns the class loss and the box loss, each summed over the sampled proposals.

    Args:
        logits: (R, K + 1) float32. R may exceed the number N of sampled proposals; the last rows
            are then ignored.
        deltas: (R, K, 4) float32, or (R, 1, 4) if class-agnostic.
        sampled: The sampled proposals with their targets.
        coder: Box coder that defines the units of the deltas.
        box_loss: "l1" and "smooth_l1" (quadratic below 1) compare deltas. "giou" compares boxes;
            this loss is multiplied by 10.
    """
    labels, foreground = sampled.labels, sampled.foreground
    classes = F.cross_entropy(logits[: len(labels)], labels, reduction="sum")
    predicted = deltas_of(deltas[foreground], labels[foreground])
    rois = torch.cat(sampled.rois)[foreground]
    if box_loss == "giou":
        boxes = coder.decode_single(predicted, rois)
        return classes, GIOU_WEIGHT * giou_loss(boxes, sampled.boxes).sum()
    expected = coder.encode_single(sampled.boxes, rois)
    measure = F.l1_loss if box_loss == "l1" else F.smooth_l1_loss
    return classes, measure(predicted, expected, reduction="sum")


def giou_loss(boxes: Tensor, others: Tensor) -> Tensor:
    """Returns 1 minus the generalized IoU of boxes[i] and others[i] for each i, (N,).

    torchvision's function selects overlapping boxes by a mask, for which the host must wait for the
    device, and which does not work on the meta device.

    Args:
        boxes: (N, 4): left, top, right, bottom.
        others: (N, 4): left, top, right, bottom.

    Source: Rezatofighi et al., arXiv 1902.09630.
    """
    left_top, right_bottom = boxes.split(2, dim=1)
    other_left_top, other_right_bottom = others.split(2, dim=1)
    inside = torch.minimum(right_bottom, other_right_bottom) - torch.maximum(
        left_top, other_left_top
    )
    around = torch.maximum(right_bottom, other_right_bottom) - torch.minimum(
        left_top, other_left_top
    )
    shared = inside[:, 0].clamp(min=0) * inside[:, 1].clamp(min=0)
    union = box_area(boxes) + box_area(others) - shared
    hull = around[:, 0] * around[:, 1]
    return 1 - shared / (union + GIOU_EPS) + (hull - union) / (hull + GIOU_EPS)

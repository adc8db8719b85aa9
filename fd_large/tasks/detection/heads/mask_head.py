"""The mask head, which predicts the mask of the object inside a box.

Source: He et al., arXiv 1703.06870; sizes as ViTDet's, Li et al., arXiv 2203.16527.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from fd_large.backbones.initialization import Draw
from fd_large.tasks.dense.convolution import (
    Convolution,
    Doubling,
    NormedConvolution,
    at_least_float32,
    he_uniform,
)
from fd_large.tasks.detection.data.target import Target
from fd_large.tasks.detection.heads.box_head import Sampled

MASK_SIDE = 14
NUM_CONVOLUTIONS = 4


class MaskHead(nn.Module):
    """Head of four convolutions and a transposed convolution that predicts a mask for each class.

    Args:
        num_classes: Number of classes, K.
        width: Channels of the pyramid and the convolutions.
    """

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            *(NormedConvolution(width, width, 3, relu=True) for _ in range(NUM_CONVOLUTIONS))
        )
        self.doubling = Doubling(width, width, draw=he_uniform())
        self.masks = Convolution(width, num_classes, 1, draw=Draw("normal", std=0.001))

    def forward(self, cuts: Tensor) -> Tensor:
        """Returns the mask logits of R boxes for each class, (R, K, 28, 28) float32.

        Args:
            cuts: (R, width, 14, 14), the pooled features of the boxes.
        """
        return self.logits(self.convolutions(cuts))

    def logits(self, features: Tensor) -> Tensor:
        """Maps the features (R, width, 14, 14) of R boxes to mask logits (R, K, 28, 28) float32.

        Args:
            features: The output of the layers `convolutions`.
        """
        return at_least_float32(self.masks(F.relu(self.doubling(features))))


def of_class(masks: Tensor, labels: Tensor) -> Tensor:
    """Returns the masks (n, M, M) of the first n of R boxes, each for the class of the box.

    Args:
        masks: (R, K, M, M), a mask for each box and class; R >= n.
        labels: (n,) int64, the classes.
    """
    return masks[torch.arange(len(labels), device=masks.device), labels]


class Taught(NamedTuple):
    """The P boxes of a batch that a mask head trains on, with their targets.

    Attributes:
        rois: (p, 4) float32 for each image, boxes that match an object: left, top, right, bottom.
        labels: (P,) int64, the class of each box.
        masks: (P, 28, 28) float32, the target mask inside each box, 0 or 1.
    """

    rois: list[Tensor]
    labels: Tensor
    masks: Tensor


def taught(sampled: Sampled, targets: Sequence[Target]) -> Taught:
    """Returns the mask targets of the sampled proposals that match an object.

    Args:
        sampled: The sampled proposals.
        targets: The target of each image. If the dataset has no masks, the result has no boxes, and
            the mask head runs without learning.
    """
    rois, objects = sampled.positives, sampled.objects
    if any(target.masks.shape[-1] == 0 for target in targets if len(target.labels)):
        rois, objects = [roi[:0] for roi in rois], [of[:0] for of in objects]
    masks = torch.cat(
        [
            cut_masks(target.masks, of, roi, 2 * MASK_SIDE)
            for target, of, roi in zip(targets, objects, rois, strict=True)
        ]
    )
    return Taught(rois, sampled.labels[sampled.foreground[: len(masks)]], masks)


def most_taught(sampled: Sampled) -> Taught:
    """Returns mask targets of the largest possible number, all zeros, to count FLOPs and memory.

    Args:
        sampled: The result of `most_sampled`.
    """
    labels = sampled.labels[sampled.foreground]
    side = 2 * MASK_SIDE
    return Taught(sampled.positives, labels, sampled.boxes.new_zeros(len(labels), side, side))


def mean_masks(
    logits: Sequence[Tensor], labels: Sequence[Tensor], counts: Sequence[int]
) -> list[Tensor]:
    """Returns the mask probabilities of each box for its class, (n, M, M) float32 for each image.

    Args:
        logits: (R, K, M, M) float32 from each mask head; the heads' probabilities are averaged.
        labels: (n,) int64 for each image, the classes of its boxes.
        counts: Number of boxes of each image. R may exceed the sum of `counts`; the last rows of
            `logits` are then ignored.
    """
    of = torch.cat(list(labels))
    masks = torch.stack([of_class(each, of).sigmoid() for each in logits]).mean(0)
    return list(masks.split(list(counts)))


def mask_loss(logits: Tensor, labels: Tensor, expected: Tensor) -> Tensor:
    """Returns the binary cross-entropy of the masks, averaged over pixels and summed over boxes.

    Args:
        logits: (R, K, M, M) float32. R may exceed P; the last rows are then ignored.
        labels: (P,) int64, the class of each box, whose mask enters the loss.
        expected: (P, M, M) float32, the target masks, 0 or 1.
    """
    loss = F.binary_cross_entropy_with_logits(of_class(logits, labels), expected, reduction="sum")
    return loss / logits.shape[-1] ** 2


@torch.no_grad()
def cut_masks(masks: Tensor, numbers: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Crops objects' masks to boxes and resizes them to (r, side, side) float32, 0 or 1.

    Args:
        masks: (n, H, W) uint8, the masks of an image's n objects.
        numbers: (r,) int64, the index of the object whose mask is cropped to each box.
        boxes: (r, 4) float32: left, top, right, bottom in pixels.
        side: Height and width of a resized mask.
    """
    needed, place = numbers.unique(return_inverse=True)
    rois = torch.cat([place[:, None].to(boxes.dtype), boxes], dim=1)
    # As many samples in a cell as it has pixels, since a mask may be thin, unlike features.
    cuts = roi_align(masks[needed, None].to(boxes.dtype), rois, (side, side), 1.0, 0, aligned=True)
    return (cuts[:, 0] >= 0.5).to(boxes.dtype)

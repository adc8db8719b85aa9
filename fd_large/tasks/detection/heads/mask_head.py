"""The mask head: the mask of the object inside a box.

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
    """Four convolutions, a transposed convolution, and a mask for each class.

    Args:
        num_classes: K.
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
        """Maps (R, width, 14, 14) to logits (R, K, 28, 28) float32."""
        return self.logits(self.convolutions(cuts))

    def logits(self, features: Tensor) -> Tensor:
        """Maps the convolutions' output (R, width, 14, 14) to logits (R, K, 28, 28)."""
        return at_least_float32(self.masks(F.relu(self.doubling(features))))


def of_class(masks: Tensor, labels: Tensor) -> Tensor:
    """Selects the mask of the class of the first n boxes: (R, K, M, M), (n,) to (n, M, M)."""
    return masks[torch.arange(len(labels), device=masks.device), labels]


class Taught(NamedTuple):
    """The targets of a mask head.

    Attributes:
        rois: (p, 4) float32 of each image, each matched to an object.
        labels: (P,) int64, classes of the rois.
        masks: (P, 28, 28) float32, 0 or 1.
    """

    rois: list[Tensor]
    labels: Tensor
    masks: Tensor


def taught(sampled: Sampled, targets: Sequence[Target]) -> Taught:
    """Returns the target masks of the sampled proposals that match an object.

    Without masks in the dataset there are none, and the mask head runs without learning.
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
    """Returns target masks of zeros for the largest possible sample, for counting."""
    labels = sampled.labels[sampled.foreground]
    side = 2 * MASK_SIDE
    return Taught(sampled.positives, labels, sampled.boxes.new_zeros(len(labels), side, side))


def mean_masks(
    logits: Sequence[Tensor], labels: Sequence[Tensor], counts: Sequence[int]
) -> list[Tensor]:
    """Returns mask probabilities of each box's class: (n, M, M) float32 for each image.

    Args:
        logits: (R, K, M, M) float32 of each mask head; the probabilities are averaged.
        labels: (n,) int64 of each image.
        counts: Number of boxes of each image; R may be above their sum.
    """
    of = torch.cat(list(labels))
    masks = torch.stack([of_class(each, of).sigmoid() for each in logits]).mean(0)
    return list(masks.split(list(counts)))


def mask_loss(logits: Tensor, labels: Tensor, expected: Tensor) -> Tensor:
    """Returns the mask loss, a mean over the places of a mask, summed over boxes.

    Args:
        logits: (R, K, M, M) float32; R may exceed P, further rows are ignored.
        labels: (P,) int64.
        expected: (P, M, M) float32, 0 or 1.
    """
    loss = F.binary_cross_entropy_with_logits(of_class(logits, labels), expected, reduction="sum")
    return loss / logits.shape[-1] ** 2


@torch.no_grad()
def cut_masks(masks: Tensor, numbers: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Crops objects' masks to boxes and resizes them: (r, side, side) float32, 0 or 1.

    Args:
        masks: (n, H, W) uint8.
        numbers: (r,) int64, the object of each box.
        boxes: (r, 4) float32, in pixels.
        side: Rows and columns of a resized mask.
    """
    needed, place = numbers.unique(return_inverse=True)
    rois = torch.cat([place[:, None].to(boxes.dtype), boxes], dim=1)
    # As many samples in a cell as it has pixels, since a mask may be thin, unlike features.
    cuts = roi_align(masks[needed, None].to(boxes.dtype), rois, (side, side), 1.0, 0, aligned=True)
    return (cuts[:, 0] >= 0.5).to(boxes.dtype)

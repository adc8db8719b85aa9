"""The box head: which class a proposal is of, and where the object's edges really are.

Sources: Ren et al., arXiv 1506.01497; sizes as ViTDet's, Li et al., arXiv 2203.16527.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from fd_large.backbones.initialization import Draw
from fd_large.backbones.layers import Linear
from fd_large.engine.zero.private_names import get
from fd_large.tasks.dense.convolution import NormedConvolution, he_uniform
from fd_large.tasks.detection.data.target import Target
from fd_large.tasks.detection.heads.matching import match, sample

BOX_SIDE = 7
NUM_CONVOLUTIONS = 4
POSITIVE_IOU = 0.5
POSITIVE_SHARE = 0.25
CODER = get("torchvision.models.detection._utils:BoxCoder")(weights=(10.0, 10.0, 5.0, 5.0))


class BoxHead(nn.Module):
    """Four convolutions, one layer on the whole cut; class and box from there.

    Args:
        num_classes: K; class K is the background.
        width: Channels of the pyramid and the convolutions; the layer has four times as many.
    """

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.convolutions = nn.Sequential(
            *(NormedConvolution(width, width, 3, relu=True) for _ in range(NUM_CONVOLUTIONS))
        )
        self.whole = Linear(width * BOX_SIDE**2, 4 * width, draw=he_uniform())
        self.classes = Linear(4 * width, num_classes + 1, draw=Draw("normal", std=0.01))
        self.boxes = Linear(4 * width, 4 * num_classes, draw=Draw("normal", std=0.001))

    def forward(self, cuts: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (R, width, 7, 7) to logits (R, K + 1) and deltas (R, K, 4), both float32."""
        x = F.relu(self.whole(self.convolutions(cuts).flatten(1)))
        return self.classes(x).float(), self.boxes(x).float().unflatten(1, (-1, 4))


class Sampled(NamedTuple):
    """The proposals of a batch that the losses look at.

    Attributes:
        rois: (n, 4) float32 of each image, those that are for an object first.
        labels: (N,) int64, the classes of all rois; K for background.
        objects: (p,) int64 of each image, which object each of the first p rois is for.
        boxes: (P, 4) float32, the boxes of all these objects.
    """

    rois: list[Tensor]
    labels: Tensor
    objects: list[Tensor]
    boxes: Tensor

    @property
    def positives(self) -> list[Tensor]:
        """The rois (p, 4) of each image that are for an object."""
        return [roi[: len(of)] for roi, of in zip(self.rois, self.objects, strict=True)]

    @property
    def foreground(self) -> Tensor:
        """(P,) int64, where these stand among the rois of the whole batch."""
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
) -> Sampled:
    """Chooses the proposals that the losses look at; the objects themselves are proposals too.

    Args:
        proposals: (n, 4) float32 of each image, possibly none.
        targets: What is in each image.
        draws: (B, 2 * rois_per_image) uniform numbers in [0, 1).
        rois_per_image: The most that are chosen.
        num_classes: K.
    """
    rois, labels, objects, boxes = [], [], [], []
    for proposal, target, own in zip(proposals, targets, draws, strict=True):
        # An early model proposes little that is right.
        candidates = torch.cat([proposal, target.boxes])
        matched = match(
            target.boxes,
            target.crowd_boxes,
            candidates,
            positive_iou=POSITIVE_IOU,
            negative_iou=POSITIVE_IOU,
            best_for_each=False,
        )
        chosen = sample(matched, rois_per_image, POSITIVE_SHARE, own)
        rois.append(candidates[torch.cat([chosen.positives, chosen.negatives])])
        objects.append(matched[chosen.positives])
        background = torch.full_like(chosen.negatives, num_classes)
        labels += [target.labels[objects[-1]], background]
        boxes.append(target.boxes[objects[-1]])
    return Sampled(rois, torch.cat(labels), objects, torch.cat(boxes))


def box_losses(logits: Tensor, deltas: Tensor, sampled: Sampled) -> tuple[Tensor, Tensor]:
    """Returns the summed losses of classes and of boxes over sampled proposals.

    Args:
        logits: (R, K + 1) float32; R may be above N, what follows is not looked at.
        deltas: (R, K, 4) float32.
        sampled: N proposals.
    """
    labels, foreground = sampled.labels, sampled.foreground
    classes = F.cross_entropy(logits[: len(labels)], labels, reduction="sum")
    wanted = CODER.encode_single(sampled.boxes, torch.cat(sampled.rois)[foreground])
    return classes, (deltas[foreground, labels[foreground]] - wanted).abs().sum()

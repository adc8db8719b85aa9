"""Mask R-CNN's second half: proposals are sorted into classes, refined, and masked.

`RoIHeads` is what the detector calls, by `sums` in training and `detect` afterwards. Heads in
cascade, with masks that see each other, are another class with these two methods.

Every call runs the box head once and the mask head once, on one box of no weight where there is
none: all ranks call the same modules in the same order, whatever is in their images.

Sources: He et al., arXiv 1703.06870; sizes as ViTDet's, Li et al., arXiv 2203.16527.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import roi_align

from fd_large.backbones.initialization import Draw
from fd_large.backbones.layers import Linear
from fd_large.tasks.dense.convolution import Convolution, Doubling, NormedConvolution, he_uniform
from fd_large.tasks.detection.heads.inference import Detections, select, with_one
from fd_large.tasks.detection.heads.matching import match, sample
from fd_large.tasks.detection.heads.pooling import pool
from fd_large.tasks.detection.heads.target import Target

BOX_SIDE, MASK_SIDE = 7, 14
NUM_CONVOLUTIONS = 4
POSITIVE_IOU = 0.5
POSITIVE_SHARE = 0.25
CODER = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))


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


class MaskHead(nn.Module):
    """Four convolutions, doubling, and a mask for each class.

    Args:
        num_classes: K.
        width: Channels.
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
        return self.masks(F.relu(self.doubling(self.convolutions(cuts)))).float()


class RoIHeads(nn.Module):
    """One box head and one mask head.

    Args:
        num_classes: K.
        width: Channels of the pyramid and the heads.
        rois_per_image: Proposals sampled for training.
        detections_per_image: Returned at most.
    """

    def __init__(
        self, num_classes: int, width: int, *, rois_per_image: int, detections_per_image: int
    ):
        super().__init__()
        self.num_classes = num_classes
        self.rois_per_image = rois_per_image
        self.detections_per_image = detections_per_image
        self.box = BoxHead(num_classes, width)
        self.mask = MaskHead(num_classes, width)

    def sums(
        self,
        maps: Sequence[Tensor],
        strides: Sequence[float],
        proposals: Sequence[Tensor],
        targets: Sequence[Target],
        draws: NDArray,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The summed losses over the sampled proposals of a batch, and their number.

        Args:
            maps: Levels of the pyramid, finest first.
            strides: Pixels per place of each level.
            proposals: Of each image, (n, 4) float32, possibly none.
            targets: Of each image.
            draws: (B, 2 * rois_per_image) uniform numbers.

        Returns: {"cls", "box", "mask"} and {"boxes", "positives"}, scalars.
        """
        rois, objects, labels = [], [], []
        for proposal, target, own in zip(proposals, targets, draws, strict=True):
            # The objects themselves as well: an early model proposes little that is right.
            candidates = torch.cat([proposal, target.boxes])
            matched = match(
                target.boxes,
                target.crowd_boxes,
                candidates,
                positive_iou=POSITIVE_IOU,
                negative_iou=POSITIVE_IOU,
                best_for_each=False,
            )
            chosen = sample(matched, self.rois_per_image, POSITIVE_SHARE, own)
            rois.append(candidates[torch.cat([chosen.positives, chosen.negatives])])
            objects.append(matched[chosen.positives])
            background = torch.full_like(chosen.negatives, self.num_classes)
            labels.append(torch.cat([target.labels[objects[-1]], background]))
        num_boxes = sum(map(len, rois))
        num_positives = sum(map(len, objects))

        padded = with_one(rois)
        logits, deltas = self.box(pool(maps, strides, padded, BOX_SIDE))
        label = torch.cat(labels)
        cls = F.cross_entropy(logits[:num_boxes], label, reduction="sum")
        foreground = torch.where(label < self.num_classes)[0]
        wanted = CODER.encode_single(
            torch.cat([t.boxes[o] for t, o in zip(targets, objects, strict=True)]),
            torch.cat(rois)[foreground],
        )
        box = (deltas[foreground, label[foreground]] - wanted).abs().sum()

        positives = [roi[: len(o)] for roi, o in zip(rois, objects, strict=True)]
        if any(target.masks.shape[-1] == 0 for target in targets if len(target.labels)):
            # A set of boxes alone: the mask head runs as everywhere, and learns nothing.
            positives = [roi[:0] for roi in rois]
            objects, foreground, num_positives = [o[:0] for o in objects], foreground[:0], 0
        padded = with_one(positives)
        masks = self.mask(pool(maps, strides, padded, MASK_SIDE))
        drawn = torch.cat(
            [
                cut_masks(target.masks, number, box_, masks.shape[-1])
                for target, number, box_ in zip(targets, objects, positives, strict=True)
            ]
        )
        of_class = masks[torch.arange(num_positives, device=masks.device), label[foreground]]
        mask = F.binary_cross_entropy_with_logits(of_class, drawn, reduction="sum")
        counts = {"boxes": cls.new_tensor(num_boxes), "positives": cls.new_tensor(num_positives)}
        return {"cls": cls, "box": box, "mask": mask / masks.shape[-1] ** 2}, counts

    def detect(
        self,
        maps: Sequence[Tensor],
        strides: Sequence[float],
        proposals: Sequence[Tensor],
        sizes: Tensor,
    ) -> list[Detections]:
        """What is seen in each image of a batch.

        Args:
            maps: Levels of the pyramid, finest first.
            strides: Pixels per place of each level.
            proposals: Of each image, (n, 4) float32, possibly none.
            sizes: (B, 2), height and width of each image without its padding.
        """
        padded = with_one(proposals)
        logits, deltas = self.box(pool(maps, strides, padded, BOX_SIDE))
        decoded = CODER.decode_single(deltas.flatten(1), torch.cat(padded)).unflatten(1, (-1, 4))
        scores = logits.softmax(dim=1)[:, : self.num_classes]
        counts = [len(proposal) for proposal in proposals]
        total = sum(counts)
        seen = [
            select(boxes, score, size, at_most=self.detections_per_image)
            for boxes, score, size in zip(
                decoded[:total].split(counts), scores[:total].split(counts), sizes, strict=True
            )
        ]
        padded = with_one([boxes for boxes, _, _ in seen])
        masks = self.mask(pool(maps, strides, padded, MASK_SIDE)).sigmoid()
        label = torch.cat([labels for _, _, labels in seen])
        of_class = masks[torch.arange(len(label), device=masks.device), label]
        parts = of_class.split([len(boxes) for boxes, _, _ in seen])
        return [Detections(*found, mask) for found, mask in zip(seen, parts, strict=True)]


@torch.no_grad()
def cut_masks(masks: Tensor, numbers: Tensor, boxes: Tensor, side: int) -> Tensor:
    """Cuts objects' masks out at boxes and resizes them: (r, side, side) float32, 0 or 1.

    Args:
        masks: (n, H, W) uint8.
        numbers: (r,) int64, the object of each box.
        boxes: (r, 4) float32, in pixels.
        side: Of a cut.
    """
    needed, place = numbers.unique(return_inverse=True)
    rois = torch.cat([place[:, None].to(boxes.dtype), boxes], dim=1)
    # As many samples in a cell as it has pixels: a mask is thin where a feature is smooth.
    cuts = roi_align(masks[needed, None].float(), rois, (side, side), 1.0, 0, aligned=True)
    return (cuts[:, 0] >= 0.5).float()

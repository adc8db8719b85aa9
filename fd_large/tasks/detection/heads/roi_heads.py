"""The second stage of a detector, which predicts class, refined box and mask of each proposal.

`RoIHeads` has the heads of Mask R-CNN. Other heads, such as a cascade, are classes in files of
their own, with the same constructor and interface (`draws_per_image`, `terms`, `candidates`,
`masks`, `shapes_only`), and are listed in the table `HEADS` of `task.py`.

Every call runs the same modules in the same order on all ranks, whatever is in the images.

Source: He et al., arXiv 1703.06870.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fd_large.tasks.detection.data.target import Target
from fd_large.tasks.detection.heads.box_head import (
    BOX_SIDE,
    CODER,
    BoxHead,
    Sampled,
    box_losses,
    most_sampled,
    sample_rois,
)
from fd_large.tasks.detection.heads.mask_head import (
    MASK_SIDE,
    MaskHead,
    Taught,
    mask_loss,
    mean_masks,
    most_taught,
    taught,
)
from fd_large.tasks.detection.heads.pooling import pool

Terms = Mapping[str, tuple[Tensor, int]]
"""{name of a loss: (sum of the loss over samples, a scalar with gradient; number of samples)}."""


class Candidates(NamedTuple):
    """The refined boxes and class scores of one image's R proposals, before any selection.

    Attributes:
        boxes: (R, K, 4) float32, a box of each proposal for each class, or (R, 1, 4), a box for
            all classes: left, top, right, bottom in pixels, not clipped to the image.
        scores: (R, K) float32, the probability of each class, 0 to 1.
    """

    boxes: Tensor
    scores: Tensor


def of_images(boxes: Tensor, scores: Tensor, counts: Sequence[int]) -> list[Candidates]:
    """Splits boxes and scores of a batch into the `Candidates` of each image.

    Args:
        boxes: (N, 4 * C), the C boxes of each of N proposals: one for each class, or one for all
            classes.
        scores: (N, K), the scores of the K classes.
        counts: Number of proposals of each image; their sum is N.
    """
    parts = zip(boxes.unflatten(1, (-1, 4)).split(counts), scores.split(counts), strict=True)
    return [Candidates(*part) for part in parts]


class RoIHeads(nn.Module):
    """The heads of Mask R-CNN: a box head and a mask head.

    Args:
        num_classes: Number of classes, K.
        width: Channels of the pyramid and the heads.
        rois_per_image: Number of proposals sampled from each image for the losses.
    """

    def __init__(self, num_classes: int, width: int, *, rois_per_image: int):
        super().__init__()
        self.num_classes = num_classes
        self.rois_per_image = rois_per_image
        self.box = BoxHead(num_classes, width)
        self.mask = MaskHead(num_classes, width)

    @property
    def draws_per_image(self) -> int:
        """Number of uniform random numbers that `terms` needs for each image."""
        return 2 * self.rois_per_image

    def terms(
        self,
        maps: Sequence[Tensor],
        strides: Sequence[float],
        proposals: Sequence[Tensor],
        sizes: Tensor,
        targets: Sequence[Target],
        draws: NDArray,
    ) -> Terms:
        """Computes the losses "cls", "box" and "mask" on proposals sampled from each image.

        Args:
            maps: Levels of the pyramid, finest first.
            strides: Stride of each level, in pixels.
            proposals: (n, 4) float32 for each image: left, top, right, bottom in pixels; n may
                be 0.
            sizes: (B, 2), height and width of each image without its padding, to which a cascade
                clips refined boxes; ignored here.
            targets: The target of each image.
            draws: (B, draws_per_image) uniform random numbers in [0, 1).

        Returns: {name of the loss: (the loss summed over the samples, number of samples)}.
        """
        sampled = sample_rois(
            proposals,
            targets,
            draws,
            rois_per_image=self.rois_per_image,
            num_classes=self.num_classes,
        )
        return self._terms(maps, strides, sampled, taught(sampled, targets))

    def shapes_only(self, maps: Sequence[Tensor], strides: Sequence[float]) -> Tensor:
        """Returns the sum of the losses on the largest possible sample, to count FLOPs and memory.

        Args:
            maps: Levels of the pyramid, finest first; may be on the meta device.
            strides: Stride of each level, in pixels.
        """
        sampled = most_sampled(len(maps[0]), self.rois_per_image, maps[0])
        terms = self._terms(maps, strides, sampled, most_taught(sampled))
        return torch.stack([total for total, _ in terms.values()]).sum()

    def _terms(
        self, maps: Sequence[Tensor], strides: Sequence[float], sampled: Sampled, of_masks: Taught
    ) -> Terms:
        """Returns the losses "cls", "box" and "mask" of sampled proposals.

        Args:
            maps: Levels of the pyramid, finest first.
            strides: Stride of each level, in pixels.
            sampled: The sampled proposals, with the targets of classes and boxes.
            of_masks: The sampled proposals that match an object, with the target masks.

        Returns: {name of the loss: (the loss summed over the samples, number of samples)}.
        """
        logits, deltas = self.box(pool(maps, strides, sampled.rois, BOX_SIDE))
        classes, boxes = box_losses(logits, deltas, sampled)
        masks = self.mask(pool(maps, strides, of_masks.rois, MASK_SIDE))
        num_rois, num_masks = len(sampled.labels), len(of_masks.labels)
        return {
            "cls": (classes, num_rois),
            "box": (boxes, num_rois),
            "mask": (mask_loss(masks, of_masks.labels, of_masks.masks), num_masks),
        }

    def candidates(
        self,
        maps: Sequence[Tensor],
        strides: Sequence[float],
        proposals: Sequence[Tensor],
        sizes: Tensor,
    ) -> list[Candidates]:
        """Returns the refined boxes and class scores of each image's proposals, before selection.

        Args:
            maps: Levels of the pyramid, finest first.
            strides: Stride of each level, in pixels.
            proposals: (n, 4) float32 for each image: left, top, right, bottom in pixels; n may
                be 0.
            sizes: (B, 2), height and width of each image without its padding.
        """
        counts = [len(proposal) for proposal in proposals]
        total = sum(counts)
        logits, deltas = self.box(pool(maps, strides, proposals, BOX_SIDE))
        boxes = CODER.decode_single(deltas[:total].flatten(1), torch.cat(list(proposals)))
        scores = logits[:total].softmax(dim=1)[:, : self.num_classes]
        return of_images(boxes, scores, counts)

    def masks(
        self,
        maps: Sequence[Tensor],
        strides: Sequence[float],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
    ) -> list[Tensor]:
        """Returns mask probabilities inside selected boxes, (n, M, M) float32 for each image.

        Args:
            maps: Levels of the pyramid, finest first.
            strides: Stride of each level, in pixels.
            boxes: (n, 4) float32 for each image: left, top, right, bottom in pixels; n may be 0.
            labels: (n,) int64 for each image, classes of the boxes.
        """
        logits = self.mask(pool(maps, strides, boxes, MASK_SIDE))
        return mean_masks([logits], labels, [len(box) for box in boxes])

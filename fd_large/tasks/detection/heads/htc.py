"""Hybrid Task Cascade (HTC), a cascade with connected mask heads and semantic context.

HTC differs from the cascade in mmdetection's form (`cascade.py`) in three points:

- The mask head of a stage learns from a new sample of the boxes that the stage has refined.
- Each mask head but the first also takes the features of the mask head before it.
- With semantic classes, a branch on all pyramid levels predicts the dataset's semantic maps (those
  of COCO-Stuff), and its embedding is added to the pooled features of the box and mask heads.

A test averages the probabilities of the three mask heads. mmdetection 2 does the same, and the
published scores of HTC++ and of its open successors were computed in this way. mmdetection 3.3 uses
only the last head's probabilities, because its code fills the list of masks after the loop over the
heads.

Source: Chen et al., arXiv 1901.07518; mmdetection 3.3 (roi_heads/htc_roi_head.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.tasks.dense.convolution import Convolution, he_normal
from fd_large.tasks.detection.data.target import SEMANTIC_STRIDE, Target
from fd_large.tasks.detection.heads.box_head import BOX_SIDE, BoxLoss
from fd_large.tasks.detection.heads.cascade import NUM_STAGES, CascadeHeads, Features
from fd_large.tasks.detection.heads.mask_head import MASK_SIDE
from fd_large.tasks.detection.heads.pooling import pool_one
from fd_large.tasks.detection.heads.roi_heads import Terms
from fd_large.tasks.detection.heads.semantic import SemanticBranch, semantic_loss


class HtcHeads(CascadeHeads):
    """The heads of HTC: three box heads, three connected mask heads, and a semantic branch.

    Args:
        num_classes: Number of classes, K.
        width: Channels of the pyramid and the heads.
        rois_per_image: Number of proposals sampled from each image in each stage for the box
            losses, and again for the mask loss.
        box_loss: Kind of box loss (`box_losses`).
        class_agnostic: True if a proposal has a single box for all classes, False if it has a box
            for each class.
        semantic_classes: Number of classes of the semantic branch; 0 for no branch.
    """

    interleaved = True
    # The default of the assigner (match_low_quality) in the published configuration.
    best_for_each = True

    def __init__(
        self,
        num_classes: int,
        width: int,
        *,
        rois_per_image: int,
        box_loss: BoxLoss = "smooth_l1",
        class_agnostic: bool = True,
        semantic_classes: int = 0,
    ):
        super().__init__(
            num_classes,
            width,
            rois_per_image=rois_per_image,
            box_loss=box_loss,
            class_agnostic=class_agnostic,
        )
        self.mask_flows = nn.ModuleList(
            Convolution(width, width, 1, draw=he_normal(width, 1)) for _ in range(NUM_STAGES - 1)
        )
        self.semantic = SemanticBranch(width, semantic_classes) if semantic_classes else None

    def _features(self, maps: Sequence[Tensor], strides: Sequence[float]) -> Features:
        return Features(maps, strides, self.semantic(maps) if self.semantic else None)

    def _semantic_terms(self, features: Features, targets: Sequence[Target]) -> Terms:
        if features.semantic is None:
            return {}
        return {"semantic": semantic_loss(features.semantic[0], targets)}

    def _box_cuts(self, features: Features, rois: Sequence[Tensor]) -> Tensor:
        cuts = super()._box_cuts(features, rois)
        if features.semantic is None:
            return cuts
        return cuts + F.adaptive_avg_pool2d(_around(features.semantic[1], rois), BOX_SIDE)

    def _mask_cuts(self, features: Features, boxes: Sequence[Tensor]) -> Tensor:
        cuts = super()._mask_cuts(features, boxes)
        return cuts if features.semantic is None else cuts + _around(features.semantic[1], boxes)

    def _masks_of(self, number: int, cuts: Tensor) -> Tensor:
        return self.mask_heads[number].logits(self._flow(cuts, number + 1)[-1])

    def _all_masks(self, cuts: Tensor) -> list[Tensor]:
        features = self._flow(cuts, NUM_STAGES)
        return [head.logits(x) for head, x in zip(self.mask_heads, features, strict=True)]

    def _flow(self, cuts: Tensor, num_heads: int) -> list[Tensor]:
        """Returns the features of each of the first `num_heads` mask heads, (R, width, 14, 14).

        Each head but the first also takes the features of the head before it.

        Args:
            cuts: (R, width, 14, 14), pooled features of boxes.
            num_heads: Number of mask heads to run.
        """
        features = [self.mask_heads[0].convolutions(cuts)]
        for number in range(1, num_heads):
            passed = F.relu(self.mask_flows[number - 1](features[-1]))
            features.append(self.mask_heads[number].convolutions(cuts + passed))
        return features


def _around(embedding: Tensor, boxes: Sequence[Tensor]) -> Tensor:
    """Returns the features of R boxes, pooled from the semantic embedding: (R, C, 14, 14).

    Args:
        embedding: (B, C, H, W), the embedding of the `SemanticBranch`.
        boxes: (n, 4) float32 for each image: left, top, right, bottom in pixels.
    """
    return pool_one(embedding, SEMANTIC_STRIDE, boxes, MASK_SIDE)

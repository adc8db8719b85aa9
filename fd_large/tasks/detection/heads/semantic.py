"""The semantic branch, which predicts semantic segmentation as context for boxes and masks.

Source: Chen et al., arXiv 1901.07518 (HTC), as in mmdetection 3.3 (fused_semantic_head.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.tasks.dense.convolution import (
    Convolution,
    at_least_float32,
    he_normal,
    he_uniform,
)
from fd_large.tasks.detection.data.target import UNLABELLED, Target

NUM_LEVELS = 5
FUSED_LEVEL = 1  # Its stride is that of the labels, `SEMANTIC_STRIDE`.
NUM_CONVOLUTIONS = 4
LOSS_WEIGHT = 0.2


class SemanticBranch(nn.Module):
    """Sums all pyramid levels at one size, and predicts class logits and an embedding from the sum.

    Args:
        width: Channels of the pyramid and of the embedding.
        num_classes: Number of semantic classes, S.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.laterals = nn.ModuleList(
            Convolution(width, width, 1, draw=he_normal(width, 1)) for _ in range(NUM_LEVELS)
        )
        self.convolutions = nn.ModuleList(
            Convolution(width, width, 3, draw=he_normal(width, 3)) for _ in range(NUM_CONVOLUTIONS)
        )
        self.embedding = Convolution(width, width, 1, draw=he_normal(width, 1))
        self.classes = Convolution(width, num_classes, 1, draw=he_uniform())

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps the pyramid to class logits and an embedding, both of the second level's size.

        Args:
            maps: (B, C, H_l, W_l) for each of five levels l = 0 to 4, finest first.

        Returns: logits (B, S, H_1, W_1) float32, and an embedding (B, C, H_1, W_1).
        """
        size = maps[FUSED_LEVEL].shape[-2:]
        x = torch.zeros_like(maps[FUSED_LEVEL])
        for level, (lateral, map_) in enumerate(zip(self.laterals, maps, strict=True)):
            if level != FUSED_LEVEL:
                map_ = F.interpolate(map_, size=size, mode="bilinear", align_corners=True)
            x = x + F.relu(lateral(map_))
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return at_least_float32(self.classes(x)), F.relu(self.embedding(x))


def semantic_loss(logits: Tensor, targets: Sequence[Target]) -> tuple[Tensor, int]:
    """Returns `LOSS_WEIGHT` times the summed cross-entropy, and the number B * h * w of positions.

    Unlabelled positions count in the number, but add nothing to the sum.

    Args:
        logits: (B, S, h, w) float32.
        targets: The target of each image. All positions are unlabelled in an image without a
            semantic map.
    """
    labels = torch.full_like(logits[:, 0], UNLABELLED, dtype=torch.int64)
    for image_labels, target in zip(labels, targets, strict=False):
        rows, columns = (
            min(a, b) for a, b in zip(image_labels.shape, target.semantic.shape, strict=True)
        )
        image_labels[:rows, :columns] = target.semantic[:rows, :columns]
    loss = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
    return LOSS_WEIGHT * loss, labels.numel()

"""The linear head, which tests how well a map separates the classes without further layers.

Source: Oquab et al., arXiv 2304.07193 (DINOv2): batch norm and a 1x1 convolution on the last map.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fd_large.backbones.batch_norm import BatchNorm
from fd_large.tasks.segmentation.heads.classifier import Classifier


class LinearHead(nn.Module):
    """Head of batch norm and a classifier on the last map.

    Args:
        width: Channels of the last map.
        num_classes: Number of classes, K.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.width = width
        self.norm = BatchNorm(self.width)
        self.classifier = Classifier(self.width, num_classes)

    def forward(self, maps: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
        """Returns logits (B, K, H, W) from the last of the maps, (B, width, H, W).

        Args:
            maps: The student's maps, of which only the last is used.
            keep: (B, width) bool, the channels that dropout keeps; None keeps all.
        """
        return self.classifier(self.norm(maps[-1]), keep)

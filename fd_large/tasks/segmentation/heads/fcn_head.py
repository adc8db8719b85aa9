"""The auxiliary head, a convolution and a classifier on a single map, for an additional loss.

Source: Long et al., arXiv 1411.4038; as in mmsegmentation's FCNHead with one convolution.
"""

from __future__ import annotations

from torch import Tensor, nn

from fd_large.backbones.batch_norm import BatchNorm
from fd_large.tasks.dense.convolution import NormedConvolution
from fd_large.tasks.segmentation.heads.classifier import Classifier


class FcnHead(nn.Module):
    """Head of a 3x3 convolution with batch norm and ReLU, and a classifier.

    Args:
        in_width: Channels of the map.
        width: Channels of the head.
        num_classes: Number of classes, K.
    """

    def __init__(self, in_width: int, width: int, num_classes: int):
        super().__init__()
        self.width = width
        self.convolution = NormedConvolution(in_width, width, 3, relu=True, norm=BatchNorm)
        self.classifier = Classifier(width, num_classes)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns the logits (B, K, H, W) of a map (B, in_width, H, W).

        Args:
            x: The map.
            keep: (B, width) bool, the channels that dropout keeps before the classifier; None keeps
                all.
        """
        return self.classifier(self.convolution(x), keep)

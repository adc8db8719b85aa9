"""The linear head, which tests how much depth a map contains without further layers.

Source: Oquab et al., arXiv 2304.07193 (DINOv2). DINOv2 classifies the depth into 256 bins; here the
head predicts a single number at each position of the map.
"""

from __future__ import annotations

from torch import Tensor, nn

from fd_large.backbones.batch_norm import BatchNorm
from fd_large.backbones.initialization import Draw
from fd_large.tasks.dense.convolution import Convolution

# The initialisation of the last layers of segmentation heads, too.
_DRAW = Draw("normal", std=0.01)


class LinearHead(nn.Module):
    """Head of batch norm and a 1x1 convolution.

    Args:
        width: Channels of the map.
    """

    def __init__(self, width: int):
        super().__init__()
        self.norm = BatchNorm(width)
        self.convolution = Convolution(width, 1, 1, draw=_DRAW)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of the depth, (B, 1, h, w), from a map (B, width, h, w)."""
        return self.convolution(self.norm(x))

"""The last layer of every segmentation head: channel dropout and a 1x1 convolution to logits."""

from __future__ import annotations

from torch import Tensor, nn

from fd_large.backbones.initialization import Draw
from fd_large.tasks.dense.convolution import Convolution

# Share of the channels that is dropped before the last layer, as published.
DROPOUT = 0.1
_DRAW = Draw("normal", std=0.01)


class Classifier(nn.Module):
    """Channel dropout, followed by a 1x1 convolution to the logits of K classes.

    Args:
        width: Channels of the map, C.
        num_classes: Number of classes, K.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.convolution = Convolution(width, num_classes, 1, draw=_DRAW)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Returns the logits (B, K, H, W) of a map (B, C, H, W).

        Args:
            x: The map.
            keep: (B, C) bool, the channels of each image that dropout keeps; None keeps all.
        """
        if keep is not None:
            x = x * (keep.to(x.dtype) / (1 - DROPOUT))[:, :, None, None]
        return self.convolution(x)

"""MIM-Depth's decoder: transposed convolutions on the last map, then convolutions at image size.

Source: Xie et al., arXiv 2205.13543, and models/model.py of SwinTransformer/MIM-Depth-Estimation
(after GLPDepth, arXiv 2201.07436), with which a test compares the outputs. The decoder is published
for Swin models of stride 32. How it was used on a ViT for the scores of the distilled models is not
public. Here, after the transposed convolutions, interpolation doubles a map of stride 16 once, and
a map of stride 32 twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.batch_norm import BatchNorm
from fd_large.backbones.initialization import Draw
from fd_large.tasks.dense.convolution import Convolution, Doubling

FILTERS, KERNELS = (32, 32, 32), (2, 2, 2)
_DRAW = Draw("normal", std=0.001)


class MimHead(nn.Module):
    """The head of the published depth runs of SwinV2: MIM-Depth's decoder and the layers after it.

    Args:
        in_width: Channels of the map.
        width: Channels after the transposed convolutions.
        stride: Stride of the map, in pixels.
        filters: Output channels of each transposed convolution.
        kernels: Side of the kernel of each transposed convolution: 2, 3 or 4.
    """

    def __init__(
        self,
        in_width: int,
        width: int,
        stride: float,
        *,
        filters: Sequence[int] = FILTERS,
        kernels: Sequence[int] = KERNELS,
    ):
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, side in zip((in_width, *filters), filters, kernels, strict=False):
            layers.append(Doubling(before, after, draw=_DRAW, kernel_size=side, bias=False))
            layers += [BatchNorm(after), nn.ReLU()]
        self.deconvolutions = nn.Sequential(*layers)
        self.convolution = nn.Sequential(
            Convolution(filters[-1], width, 3, draw=_DRAW), BatchNorm(width), nn.ReLU()
        )
        # The remaining stride is made up for by doublings by interpolation, as published.
        self.doublings = max(0, round(math.log2(stride / 2 ** len(filters))))
        self.last = nn.Sequential(
            Convolution(width, width, 3, draw=_DRAW),
            nn.ReLU(),
            Convolution(width, 1, 3, draw=_DRAW),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Returns the logits of the depth, (B, 1, H, W), from a map (B, in_width, h, w).

        H and W are the height and width of the image if the stride is a power of two of at least 8.
        For other strides they are close to the height and width of the image.
        """
        x = self.convolution(self.deconvolutions(x))
        for _ in range(self.doublings):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        return self.last(x)

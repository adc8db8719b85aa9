"""UPerNet's head: pyramid pooling of the last map, a top-down pyramid, and fusion of its levels.

Source: Xiao et al., arXiv 1807.10221; Zhao et al., arXiv 1612.01105 (pyramid pooling). Details
follow mmsegmentation's UPerHead, with which a test compares the outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.batch_norm import BatchNorm
from fd_large.tasks.dense.convolution import NormedConvolution
from fd_large.tasks.segmentation.heads.classifier import Classifier

POOLS = (1, 2, 3, 6)


class UperHead(nn.Module):
    """The head of the published segmentation runs of Swin, BEiT and MAE.

    Args:
        widths: Channels of the maps, finest first.
        width: Channels of the head.
        num_classes: Number of classes, K.
        pools: Sides of the square grids to which the last map is pooled.
    """

    def __init__(
        self, widths: Sequence[int], width: int, num_classes: int, *, pools: Sequence[int] = POOLS
    ):
        super().__init__()
        *fine, last = widths
        self.width, self.pool_sides = width, tuple(pools)
        self.pools = nn.ModuleList(_convolution(last, width, 1) for _ in pools)
        self.pooled = _convolution(last + len(pools) * width, width, 3)
        self.laterals = nn.ModuleList(_convolution(channels, width, 1) for channels in fine)
        self.outputs = nn.ModuleList(_convolution(width, width, 3) for _ in fine)
        self.fused = _convolution(len(widths) * width, width, 3)
        self.classifier = Classifier(width, num_classes)

    def forward(self, maps: Sequence[Tensor], keep: Tensor | None = None) -> Tensor:
        """Returns logits (B, K, H_0, W_0) of the size of the finest map.

        Args:
            maps: The map (B, C_s, H_s, W_s) of each stage s, finest first.
            keep: (B, width) bool, the channels that dropout keeps before the classifier; None keeps
                all.
        """
        *fine, last = maps
        pooled = [last]
        for side, convolution in zip(self.pool_sides, self.pools, strict=True):
            pooled.append(_resized(convolution(F.adaptive_avg_pool2d(last, side)), last))
        above = self.pooled(torch.cat([x.to(pooled[-1].dtype) for x in pooled], dim=1))
        levels = [lateral(x) for x, lateral in zip(fine, self.laterals, strict=True)]
        levels.append(above)
        for i in reversed(range(len(fine))):
            levels[i] = levels[i] + _resized(levels[i + 1], levels[i])
        levels = [output(x) for x, output in zip(levels, self.outputs, strict=False)] + [above]
        levels = [levels[0], *(_resized(x, levels[0]) for x in levels[1:])]
        return self.classifier(self.fused(torch.cat(levels, dim=1)), keep)


def _convolution(in_channels: int, out_channels: int, kernel_size: int) -> NormedConvolution:
    return NormedConvolution(in_channels, out_channels, kernel_size, relu=True, norm=BatchNorm)


def _resized(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)

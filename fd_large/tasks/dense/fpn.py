"""The feature pyramid over the four stages of a Swin model.

A new norm on each stage's map, as in every published detector with a Swin backbone, then lateral
and output convolutions with a norm each (ViTDet's choice for its Swin baselines).

Sources: Lin et al., arXiv 1612.03144; Liu et al., arXiv 2103.14030; Li et al., arXiv 2203.16527.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.layers import LayerNorm
from fd_large.tasks.dense.convolution import NormedConvolution

STAGE_NORM_EPS = 1e-5


class FeaturePyramid(nn.Module):
    """Four maps of a backbone to five of one width, each half as large as the one before.

    Args:
        widths: Channels of the stages.
        width: Channels of the pyramid.
    """

    def __init__(self, widths: Sequence[int], width: int):
        super().__init__()
        for stage, channels in enumerate(widths):
            # Under the names that detectors with a Swin backbone give them.
            self.add_module(f"norm{stage}", LayerNorm(channels, STAGE_NORM_EPS))
        self.laterals = nn.ModuleList(
            NormedConvolution(channels, width, 1, relu=False) for channels in widths
        )
        self.outputs = nn.ModuleList(NormedConvolution(width, width, 3, relu=False) for _ in widths)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, H_s, W_s, C_s) of each stage to (B, width, H_s, W_s) and a coarser last one."""
        sides = []
        for stage, (x, lateral) in enumerate(zip(maps, self.laterals, strict=True)):
            normed = getattr(self, f"norm{stage}")(x)
            sides.append(lateral(normed.permute(0, 3, 1, 2)))
        total, pyramid = sides[-1], []
        for stage in reversed(range(len(sides))):
            if stage + 1 < len(sides):
                above = F.interpolate(total, size=sides[stage].shape[-2:], mode="nearest")
                total = sides[stage] + above
            pyramid.append(self.outputs[stage](total))
        return [*reversed(pyramid), coarser(pyramid[0])]


def coarser(x: Tensor) -> Tensor:
    """Every second place of a map (B, C, H, W): the level above the last, for large anchors."""
    return F.max_pool2d(x, kernel_size=1, stride=2)

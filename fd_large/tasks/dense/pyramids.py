"""Pyramids: from the maps of a backbone to five maps of one width, each half as large.

torchvision's pyramid does not serve: it draws its children's weights from its own constructor
(see convolution.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.layers import LayerNorm
from fd_large.tasks.dense.convolution import (
    NORM_EPS,
    ChannelNorm,
    Doubling,
    NormedConvolution,
    he_uniform,
)

STAGE_NORM_EPS = 1e-5


class FeaturePyramid(nn.Module):
    """The feature pyramid over the stages of a hierarchical backbone.

    A new norm on each stage's map, as all published detectors with a Swin backbone have it, then
    lateral and output convolutions with a norm each (ViTDet's choice for its Swin baselines).

    Args:
        widths: Channels of the stages.
        width: Channels of the pyramid.

    Sources: Lin et al., arXiv 1612.03144; Liu et al., arXiv 2103.14030; Li et al., arXiv
        2203.16527.
    """

    def __init__(self, widths: Sequence[int], width: int):
        super().__init__()
        for stage, channels in enumerate(widths):
            # Under the names that detectors with a Swin backbone give them.
            self.add_module(f"norm{stage}", LayerNorm(channels, STAGE_NORM_EPS))
        self.laterals, self.outputs = _convolutions(widths, width)

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
        return [*reversed(pyramid), _coarser(pyramid[0])]


class SimplePyramid(nn.Module):
    """ViTDet's simple pyramid over the last map of a plain backbone.

    Args:
        in_width: Channels of the backbone's map.
        width: Channels of the pyramid.

    Source: Li et al., arXiv 2203.16527.
    """

    def __init__(self, in_width: int, width: int):
        super().__init__()
        half, quarter = in_width // 2, in_width // 4
        self.fourfold = nn.Sequential(
            Doubling(in_width, half, draw=he_uniform()),
            ChannelNorm(half, NORM_EPS),
            nn.GELU(),
            Doubling(half, quarter, draw=he_uniform()),
        )
        self.twofold = Doubling(in_width, half, draw=he_uniform())
        self.laterals, self.outputs = _convolutions((quarter, half, in_width, in_width), width)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, H, W, C) to (B, width, 4H, 4W), 2H, H, ceil(H/2) and ceil(H/4)."""
        x = x.permute(0, 3, 1, 2)
        # In this order: backward adds up the gradients of x in the reverse, to the last bit.
        scales = (
            self.fourfold(x),
            self.twofold(x),
            x,
            F.max_pool2d(x, kernel_size=2, stride=2, ceil_mode=True),
        )
        pyramid = [
            output(lateral(scale))
            for scale, lateral, output in zip(scales, self.laterals, self.outputs, strict=True)
        ]
        return [*pyramid, _coarser(pyramid[-1])]


def _convolutions(widths: Sequence[int], width: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Lateral 1x1 convolutions, and 3x3 convolutions of what comes of them, one each a level."""
    return (
        nn.ModuleList(NormedConvolution(channels, width, 1, relu=False) for channels in widths),
        nn.ModuleList(NormedConvolution(width, width, 3, relu=False) for _ in widths),
    )


def _coarser(x: Tensor) -> Tensor:
    """Every second place of a map (B, C, H, W): the level above the last, for large anchors."""
    return F.max_pool2d(x, kernel_size=1, stride=2)

"""Pyramids, which turn a backbone's maps into maps with successively halved sides.

Detectors read five maps of one width; segmentation reads four, of the backbone's own widths.

torchvision's pyramid cannot be used, since it initialises its children's weights in its own
constructor (see convolution.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.batch_norm import BatchNorm
from fd_large.backbones.initialization import FAN_IN_UNIFORM, Draw
from fd_large.backbones.layers import LayerNorm
from fd_large.tasks.dense.convolution import (
    NORM_EPS,
    ChannelNorm,
    Doubling,
    NormedConvolution,
    he_uniform,
)

STAGE_NORM_EPS = 1e-5


class NormedStages(nn.Module):
    """A new norm on each stage's map, as all published dense heads on a Swin backbone have it.

    Args:
        widths: Channels of the stages.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        for stage, channels in enumerate(widths):
            # The norms have the names that they have in published detectors with a Swin backbone.
            self.add_module(f"norm{stage}", LayerNorm(channels, STAGE_NORM_EPS))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, H_s, W_s, C_s) of each stage to (B, C_s, H_s, W_s)."""
        return [
            getattr(self, f"norm{stage}")(x).permute(0, 3, 1, 2) for stage, x in enumerate(maps)
        ]


class FeaturePyramid(NormedStages):
    """The feature pyramid over the stages of a hierarchical backbone.

    Lateral and output convolutions have a norm each (ViTDet's choice for its Swin baselines).

    Args:
        widths: Channels of the stages.
        width: Channels of the pyramid.

    Sources: Lin et al., arXiv 1612.03144; Liu et al., arXiv 2103.14030; Li et al., arXiv
        2203.16527.
    """

    def __init__(self, widths: Sequence[int], width: int):
        super().__init__(widths)
        self.laterals, self.outputs = _convolutions(widths, width)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, H_s, W_s, C_s) of each stage to (B, width, H_s, W_s), and adds a coarser map."""
        normed = super().forward(maps)
        sides = [lateral(x) for x, lateral in zip(normed, self.laterals, strict=True)]
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
        self.fourfold = _fourfold(
            (in_width, half, quarter), he_uniform(), lambda width: ChannelNorm(width, NORM_EPS)
        )
        self.twofold = Doubling(in_width, half, draw=he_uniform())
        self.laterals, self.outputs = _convolutions((quarter, half, in_width, in_width), width)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, H, W, C) to five maps (B, width, h, w), h = 4H, 2H, H, ceil(H/2), ceil(H/4)."""
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


class RescaledMaps(nn.Module):
    """Rescales a plain backbone's maps, all of one size, to those of a hierarchical backbone.

    Each map is scaled by transposed convolutions or by max pooling; its width is unchanged.

    Args:
        width: Channels of the maps.
        scales: Factor of each map's sides: 4, 2, 1, 1/2 or 1/4, each at most once.

    Source: Bao et al., arXiv 2106.08254, and its segmentation code (fpn1 to fpn4).
    """

    def __init__(self, width: int, scales: Sequence[float] = (4, 2, 1, 0.5)):
        super().__init__()
        self.scales = tuple(scales)
        self.fourfold = self.twofold = None
        if 4 in scales:
            self.fourfold = _fourfold((width,) * 3, FAN_IN_UNIFORM, BatchNorm)
        if 2 in scales:
            self.twofold = Doubling(width, width, draw=FAN_IN_UNIFORM)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, H, W, C) of some blocks to (B, C, scale x H, scale x W), rounded down."""
        rescaled = []
        for x, scale in zip(maps, self.scales, strict=True):
            x = x.permute(0, 3, 1, 2)
            if scale == 4:
                x = self.fourfold(x)
            elif scale == 2:
                x = self.twofold(x)
            elif scale < 1:
                side = round(1 / scale)
                x = F.max_pool2d(x, kernel_size=side, stride=side)
            rescaled.append(x)
        return rescaled


def _fourfold(
    widths: tuple[int, int, int], draw: Draw, norm: Callable[[int], nn.Module]
) -> nn.Sequential:
    """Returns layers that double a map's sides twice, with a norm and a GELU between."""
    first, middle, last = widths
    return nn.Sequential(
        Doubling(first, middle, draw=draw),
        norm(middle),
        nn.GELU(),
        Doubling(middle, last, draw=draw),
    )


def _convolutions(widths: Sequence[int], width: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Returns lateral 1x1 convolutions and 3x3 output convolutions, one of each per level."""
    return (
        nn.ModuleList(NormedConvolution(channels, width, 1, relu=False) for channels in widths),
        nn.ModuleList(NormedConvolution(width, width, 3, relu=False) for _ in widths),
    )


def _coarser(x: Tensor) -> Tensor:
    """Returns every second row and column of a map (B, C, H, W), as a level for large anchors."""
    return F.max_pool2d(x, kernel_size=1, stride=2)

"""Pyramids, which turn a backbone's maps into maps whose sides are halved from level to level.

Detectors read five maps with the same number of channels. Segmentation reads four maps with the
backbone's numbers of channels. torchvision's pyramid cannot be used, since it initialises its
children's weights in its own constructor (see convolution.py).
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
    """A new norm on the map of each stage, as in all published dense heads on a Swin backbone.

    Args:
        widths: Number of channels of each stage.
    """

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        for stage, channels in enumerate(widths):
            # The norms have the names that they have in published detectors with a Swin backbone.
            self.add_module(f"norm{stage}", LayerNorm(channels, STAGE_NORM_EPS))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Returns the normed map (B, C, H, W) of each stage from its map (B, H, W, C)."""
        return [
            getattr(self, f"norm{stage}")(x).permute(0, 3, 1, 2) for stage, x in enumerate(maps)
        ]


class FeaturePyramid(NormedStages):
    """The feature pyramid over the stages of a hierarchical backbone.

    Each lateral and each output convolution has a norm, as in ViTDet's Swin baselines.

    Args:
        widths: Number of channels of each stage.
        width: Number of channels of the pyramid's maps.

    Sources: Lin et al., arXiv 1612.03144; Liu et al., arXiv 2103.14030; Li et al., arXiv
        2203.16527.
    """

    def __init__(self, widths: Sequence[int], width: int):
        super().__init__(widths)
        self.laterals, self.outputs = _convolutions(widths, width)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Returns a map (B, width, H, W) for each stage's map (B, H, W, C), finest first.

        A further map, with half the sides of the coarsest, comes last.
        """
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
        in_width: Number of channels of the backbone's map.
        width: Number of channels of the pyramid's maps.

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
        """Returns five maps (B, width, h, w) from a map (B, H, W, C).

        The heights h of the five maps are 4H, 2H, H, ceil(H/2) and ceil(H/4), and the widths w are
        4W, 2W, W, ceil(W/2) and ceil(W/4).
        """
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
    """Rescales a plain backbone's maps, so that they have a hierarchical backbone's sizes.

    Each map is scaled by transposed convolutions or by max pooling, and keeps its channels.

    Args:
        width: Number of channels of the maps.
        scales: Factor of the sides of each map; 4, 2, 1, 1/2 or 1/4, each at most once.

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
        """Returns (B, C, scale * H, scale * W) for each map (B, H, W, C), with sides rounded down.

        Args:
            maps: A map for each of `scales`.
        """
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
    """Returns layers that double a map's sides twice, with a norm and a GELU between.

    Args:
        widths: Numbers of channels before, between and after the two layers.
        draw: Distribution of the layers' weights.
        norm: Constructor of the norm, from the number of channels.
    """
    first, middle, last = widths
    return nn.Sequential(
        Doubling(first, middle, draw=draw),
        norm(middle),
        nn.GELU(),
        Doubling(middle, last, draw=draw),
    )


def _convolutions(widths: Sequence[int], width: int) -> tuple[nn.ModuleList, nn.ModuleList]:
    """Returns the lateral 1x1 convolutions and the 3x3 output convolutions of a pyramid's levels.

    Args:
        widths: Number of channels of each level's input.
        width: Number of channels of the outputs.
    """
    return (
        nn.ModuleList(NormedConvolution(channels, width, 1, relu=False) for channels in widths),
        nn.ModuleList(NormedConvolution(width, width, 3, relu=False) for _ in widths),
    )


def _coarser(x: Tensor) -> Tensor:
    """Returns every second row and column of a map (B, C, H, W), as a coarser level."""
    return F.max_pool2d(x, kernel_size=1, stride=2)

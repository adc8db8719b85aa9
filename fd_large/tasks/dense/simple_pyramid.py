"""ViTDet's simple pyramid: four scales from the last map of a plain backbone.

Source: Li et al., arXiv 2203.16527.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.tasks.dense.convolution import (
    NORM_EPS,
    ChannelNorm,
    Doubling,
    NormedConvolution,
    he_uniform,
)
from fd_large.tasks.dense.fpn import coarser


class SimplePyramid(nn.Module):
    """One map to five of one width: four times, twice, once, half and a quarter as fine.

    Args:
        in_width: Channels of the backbone's map.
        width: Channels of the pyramid.
    """

    def __init__(self, in_width: int, width: int):
        super().__init__()
        half, quarter = in_width // 2, in_width // 4
        # Twice as fine twice over; the first of these, for the second level, are of its own.
        self.fourfold = nn.Sequential(
            Doubling(in_width, half, draw=he_uniform()),
            ChannelNorm(half, NORM_EPS),
            nn.GELU(),
            Doubling(half, quarter, draw=he_uniform()),
        )
        self.twofold = Doubling(in_width, half, draw=he_uniform())
        widths = (quarter, half, in_width, in_width)
        self.laterals = nn.ModuleList(
            NormedConvolution(channels, width, 1, relu=False) for channels in widths
        )
        self.outputs = nn.ModuleList(NormedConvolution(width, width, 3, relu=False) for _ in widths)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Maps (B, H, W, C) to (B, width, 4H, 4W), 2H, H, ceil(H/2) and ceil(H/4)."""
        x = x.permute(0, 3, 1, 2)
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
        return [*pyramid, coarser(pyramid[-1])]

"""Windows over a map: their size, shift, padding and coordinates.

Two rules exist for a map that its windows do not divide, or that is at most one window. By
`masked`, the rule of the published classifiers extended to maps of any size, a window is never
larger than the map, a single window is not shifted, and padding is hidden from attention. By
`official`, the rule of the published backbones of mmdetection, mmsegmentation and
MIM-Depth-Estimation, windows keep their size and shift, and the map is padded with zero tokens that
take part in attention.

Source of `official`: github.com/SwinTransformer/MIM-Depth-Estimation, swin_transformer_v2.py.

Coordinate tables are cached by (window, pretrained window, device). The tables are made by numpy,
since `deepspeed.zero.Init` patches torch's factories, which would then round coordinates to
bfloat16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WindowRule = Literal["masked", "official"]


class Windows(NamedTuple):
    """The windows of one block over one map.

    Attributes:
        side: Side w of a window in tokens.
        shift: Offset of the windows from the map's corner, in tokens.
        bottom: Number of rows of zero tokens below the map, which take part in attention.
        right: Number of columns of zero tokens to the right of the map, which take part in
            attention.
    """

    side: int
    shift: int
    bottom: int = 0
    right: int = 0

    def pad(self, x: Tensor) -> Tensor:
        """Pads `x`, (B, H, W, C), with zero tokens to (B, H + bottom, W + right, C)."""
        return F.pad(x, (0, 0, 0, self.right, 0, self.bottom)) if self._pads else x

    def crop(self, x: Tensor) -> Tensor:
        """Removes what `pad` adds: maps (B, H + bottom, W + right, C) to (B, H, W, C)."""
        height, width = x.shape[1] - self.bottom, x.shape[2] - self.right
        return x[:, :height, :width] if self._pads else x

    @property
    def _pads(self) -> bool:
        return self.bottom > 0 or self.right > 0


@dataclass(frozen=True)
class StageWindows:
    """The rule that cuts the maps of a stage into windows.

    Attributes:
        side: Requested side of a window in tokens.
        shifts: Whether odd blocks shift their windows, by half a side. With the rule "masked", a
            single window is never shifted.
        rule: "masked": a window is at most as large as the map, and padding is hidden from
            attention. "official": windows keep their size, and padding takes part in attention.
    """

    side: int
    shifts: bool = True
    rule: WindowRule = "masked"

    def over(self, height: int, width: int, block: int) -> Windows:
        """Returns the windows of a block over a map.

        Args:
            height: Rows of the map, in tokens.
            width: Columns of the map, in tokens.
            block: Number of the block in the stage, from 0; only its parity counts.
        """
        shortest = min(height, width)
        may_shift = self.shifts and (self.rule == "official" or shortest > self.side)
        # The block is asked last: torch.compile then shares a graph where it makes no difference.
        shift = self.side // 2 if may_shift and block % 2 == 1 else 0
        if self.rule == "official":
            return Windows(self.side, shift, -height % self.side, -width % self.side)
        return Windows(min(self.side, shortest), shift)


@lru_cache(maxsize=64)
def coordinate_table(window: int, pretrained_window: int, device: torch.device) -> Tensor:
    """Returns SwinV2's log-spaced relative coordinates: ((2w - 1)^2, 2) float32.

    An offset of d tokens has the coordinate sign(t) log2(|t| + 1) / log2(8), t = 8 d / (w0 - 1),
    where w0 is the side of the window in pre-training. A window of one token has the single offset
    0, which the published code divides by 0; here the coordinate is 0.

    Args:
        window: w, the side of the window in tokens.
        pretrained_window: w0, the side in pre-training; 0 means that it is w.
        device: Device of the result.
    """
    reference = max((pretrained_window or window) - 1, 1)
    with torch.inference_mode(False):
        offsets = torch.from_numpy(np.arange(1 - window, window, dtype=np.float32))
        scaled = offsets / reference * 8
        log = scaled.sign() * torch.log2(scaled.abs() + 1.0) / math.log2(8)
        n = len(log)
        table = torch.stack([log[:, None].expand(n, n), log[None, :].expand(n, n)], dim=-1)
        return table.reshape(-1, 2).to(device)

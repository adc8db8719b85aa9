"""Windows over a map: their size, their shift and their coordinates.

Tables are functions of (window, pretrained window, device), cached, and made outside the factories
that `deepspeed.zero.Init` patches, so that no bf16 engine rounds a coordinate.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def fit_window(height: int, width: int, window: int) -> int:
    """Returns the window that a map gets: the wanted one, or the map's shorter side if smaller."""
    return min(window, height, width)


def window_shift(height: int, width: int, window: int, block: int) -> int:
    """Returns by how much a block's windows are shifted: half a window in odd blocks.

    A map no larger than its window on either axis is not shifted.
    """
    return window // 2 if block % 2 == 1 and min(height, width) > window else 0


@lru_cache(maxsize=64)
def coordinate_table(window: int, pretrained_window: int, device: torch.device) -> Tensor:
    """Returns SwinV2's log-spaced relative coordinates: ((2w - 1)^2, 2) float32.

    t = 8 d / (w0 - 1), then sign(t) log2(|t| + 1) / log2(8), where w0 is the window of
    pre-training. A window of one token has the single offset 0, which the published code divides
    by 0; here it stays 0.

    Args:
        window: w, side in tokens.
        pretrained_window: w0; 0: the window itself.
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

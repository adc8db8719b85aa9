"""The target of each pixel: its class, its depth.

A NamedTuple, because a batch is moved to the device and pinned by walking through tuples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Targets(NamedTuple):
    """The targets of a batch.

    Attributes:
        truth: (B, H, W), what the dataset has at each pixel, or what it has where it knows nothing.
        sizes: (B, 2) int64, height and width of each image without its padding.
        positions: (B,) int64, in the epoch's order: what random choices of a sample depend on. No
            tensor, so that it stays on the host, where they are drawn.
        epoch: Counted from 0.
    """

    truth: Tensor
    sizes: Tensor
    positions: NDArray[np.int64]
    epoch: int

"""The target of each pixel of a batch, a class or a depth.

It is a NamedTuple, because a batch is moved to the device and pinned by walking through tuples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Targets(NamedTuple):
    """The targets of a batch.

    Attributes:
        truth: (B, H, W), the dataset's value of each pixel, including its value for unknown pixels.
        sizes: (B, 2) int64, height and width of each image without its padding.
        positions: (B,) int64, in the epoch's order; random choices for a sample depend on them. A
            NumPy array stays on the host, where the choices are drawn.
        epoch: Counted from 0.
    """

    truth: Tensor
    sizes: Tensor
    positions: NDArray[np.int64]
    epoch: int

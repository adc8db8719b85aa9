"""The targets of a batch, with a class or a depth for each pixel.

`Targets` is a NamedTuple, since the code that pins a batch or moves it to the device looks for
tensors in tuples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


class Targets(NamedTuple):
    """The targets of a batch.

    Attributes:
        truth: (B, H, W), the class or depth of each pixel in the dataset; for unknown pixels and
            padding, the value that stands for unknown (`TrainingViews.unknown`).
        sizes: (B, 2) int64, height and width of each image without its padding.
        positions: (B,) int64, positions in the epoch's order, on which random choices for an image
            depend. As a NumPy array the positions stay on the host, where random numbers are drawn.
        epoch: Epoch, counted from 0.
    """

    truth: Tensor
    sizes: Tensor
    positions: NDArray[np.int64]
    epoch: int

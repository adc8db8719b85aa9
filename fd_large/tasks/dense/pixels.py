"""Normalises a batch of images of several sizes for the student, with grey padding."""

from __future__ import annotations

import torch
from torch import Tensor

from fd_large.backbones.statistics import Statistics, normalise

# Value of the pixels that pad an image, as in detectron2's large-scale jitter. It is not 0 after
# normalisation: a model whose biases are still 0 would map zeros to zeros, for which each norm
# multiplies gradients by 1 / sqrt(eps).
PADDING = 128


def normalised(images: Tensor, sizes: Tensor, statistics: Statistics) -> Tensor:
    """Returns normalised float32 pixels (B, 3, H, W), in which padding is grey.

    Args:
        images: (B, 3, H, W) uint8, padded at right and bottom with any values.
        sizes: (B, 2) int64, height and width of each image without its padding.
        statistics: Mean and deviation that normalise the pixels.
    """
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) < sizes[:, :1]  # (B, H)
    columns = torch.arange(width, device=images.device) < sizes[:, 1:]
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    return normalise(images.where(inside, PADDING), statistics)

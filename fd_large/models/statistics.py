"""Image statistics: from uint8 pixels to what a net was trained on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Channel mean and standard deviation of images in 0..1, red, green, blue."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP = Statistics(
    (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)


def normalise(images: Tensor, statistics: Statistics) -> Tensor:
    """Maps uint8 images (B, 3, H, W) to normalised float32 images of the same shape."""
    mean = torch.tensor(statistics.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(statistics.std, device=images.device).view(1, 3, 1, 1)
    return (images.float() / 255 - mean) / std

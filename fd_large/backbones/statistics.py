"""Image statistics, and the normalisation of uint8 pixels by them."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class Statistics(NamedTuple):
    """Mean and standard deviation of the red, green and blue channel of pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


IMAGENET = Statistics((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
OPENAI_CLIP = Statistics((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


def normalise(images: Tensor, statistics: Statistics) -> Tensor:
    """Normalises uint8 `images`, (B, 3, H, W), by `statistics`, to float32 of the same shape.

    Pixels are divided by 255 first.
    """
    mean, std = _constants(statistics, images.device)
    return (images.float() / 255 - mean) / std


@lru_cache
def _constants(statistics: Statistics, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns mean and standard deviation of `statistics`, each (1, 3, 1, 1), on `device`.

    Both tensors are cached, since a copy to a GPU in each step would make the CPU wait.
    """
    mean, std = (torch.tensor(row, device=device).view(1, 3, 1, 1) for row in statistics)
    return mean, std

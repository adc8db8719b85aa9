"""The frozen teacher: its own statistics, size and map; never trained, never in a checkpoint."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.resize import resize_images
from fd_large.backbones.statistics import Statistics, normalise


class Teacher(nn.Module):
    """A frozen backbone that maps uint8 images to its feature map.

    Args:
        model: A backbone: normalised images -> FeatureMap after its final norm.
        statistics: The normalisation that the model was trained with.
        image_size: Side to which the normalised images are resized (bilinear, antialiased) before
            the model; 0 leaves them as they are.
    """

    def __init__(self, net: nn.Module, statistics: Statistics, *, image_size: int = 0) -> None:
        super().__init__()
        self.net = net
        self.statistics = statistics
        self.image_size = image_size
        self.requires_grad_(False)
        super().train(False)

    @property
    def width(self) -> int:
        """Channels of the map."""
        return self.net.width

    def grid(self, image_size: int) -> tuple[int, int]:
        """Rows and columns of the map for square images of this side."""
        side = self.image_size or image_size
        return self.net.grid(side, side)

    def train(self, mode: bool = True) -> Teacher:
        """A teacher stays in evaluation whatever its parent does."""
        return super().train(False)

    def forward(self, images: Tensor) -> FeatureMap:
        """Returns the map of uint8 images (B, 3, H, W), without gradient.

        Source: official code, models/feature_distillation.py FD.forward, the target branch.
        """
        with torch.no_grad():
            pixels = normalise(images, self.statistics)
            if self.image_size and self.image_size != pixels.shape[-1]:
                pixels = resize_images(pixels, (self.image_size, self.image_size))
            # Under ZeRO-3 a parameter outside its module's forward is empty but keeps its dtype.
            return self.net(pixels.to(next(self.net.parameters()).dtype))

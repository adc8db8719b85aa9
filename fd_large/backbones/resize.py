"""Resizes images and maps on the device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_images(images: Tensor, size: tuple[int, int], *, antialias: bool = True) -> Tensor:
    """Bilinear resize with corners not aligned, computed in float32 at least.

    Args:
        images: (B, C, H, W), any float dtype.
        size: (rows, columns) of the result.
        antialias: Widens the filter when shrinking, as torchvision's Resize does today; False is
            its behaviour at the time of the published teachers.

    Returns: (B, C, *size), dtype of the input.
    """
    wide = torch.promote_types(images.dtype, torch.float32)
    return F.interpolate(
        images.to(wide), size=size, mode="bilinear", align_corners=False, antialias=antialias
    ).to(images.dtype)

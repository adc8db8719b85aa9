"""Resizes images and maps on their device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_images(images: Tensor, size: tuple[int, int], *, antialias: bool = True) -> Tensor:
    """Resizes images or maps bilinearly, with corners not aligned, in float32 or wider.

    Args:
        images: (B, C, H, W), any float dtype.
        size: (rows, columns) of the result.
        antialias: Whether the filter is widened when images shrink. torchvision's Resize does so
            today; it did not when the published teachers were trained.

    Returns: (B, C, *size), in the dtype of the input.
    """
    wide = torch.promote_types(images.dtype, torch.float32)
    return F.interpolate(
        images.to(wide), size=size, mode="bilinear", align_corners=False, antialias=antialias
    ).to(images.dtype)

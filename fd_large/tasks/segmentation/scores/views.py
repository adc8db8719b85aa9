"""Test-time augmentation: merges the logits of an image's resized and mirrored views.

Source: mmsegmentation, seg_tta.py; a test compares the results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.nn.functional as F
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""Function that maps images or windows (B, 3, h, w) to logits (B, K, h, w)."""


def averaged(views: Iterable[tuple[Tensor, bool]], size: tuple[int, int]) -> Tensor:
    """Averages the class probabilities of several views of one image.

    Args:
        views: For each view its logits (B, K, h, w), and whether the view is mirrored.
        size: Height and width of the result.

    Returns: (B, K, H, W), mean probabilities of the K classes.
    """
    total: Tensor | None = None
    count = 0
    for logits, mirrored in views:
        probabilities = resized(logits.flip(-1) if mirrored else logits, size).softmax(dim=1)
        total = probabilities if total is None else total.add_(probabilities)
        count += 1
    assert total is not None
    return total / count


def resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes `logits` (B, K, h, w) bilinearly to the height and width `size`, (B, K, H, W)."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)

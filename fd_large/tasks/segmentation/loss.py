"""The loss of segmentation: cross-entropy at every pixel that is not ignored."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.ranks import distributed

IGNORED = -1
"""Label of pixels that are neither learnt nor scored."""

Pixels = Literal["all", "labelled"]


def pixel_loss(logits: Tensor, labels: Tensor, *, over: Pixels = "all") -> Tensor:
    """Returns the cross-entropy of logits resized to the labels.

    Args:
        logits: (B, K, h, w), any float dtype; sums run in float32.
        labels: (B, H, W), any integer dtype, `IGNORED` or a class.
        over: Divisor of the sum. "all": the number of pixels, including ignored ones, as in the
            published runs (mmsegmentation's default). "labelled": the number of labelled pixels
            of this pass on all ranks, by a collective.

    Returns: scalar float32, 0 where no pixel is labelled.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    labels = labels.long()
    total = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    if over == "all":
        return total / labels.numel()
    # The engine averages over the ranks: a rank's sum is divided by the ranks' mean count.
    count = distributed.sum_tensor((labels != IGNORED).sum().double())
    return total / (count.clamp(min=1) / distributed.world_size()).to(total.dtype)

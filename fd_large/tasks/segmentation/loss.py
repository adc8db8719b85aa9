"""The segmentation loss, the cross-entropy at every pixel that is not ignored."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.ranks import distributed

IGNORED = -1
"""Label of pixels that neither the loss nor the scores count."""

Pixels = Literal["all", "labelled"]


def pixel_loss(logits: Tensor, labels: Tensor, *, over: Pixels = "all") -> Tensor:
    """Returns the cross-entropy of the labels, after bilinear resizing of the logits to their size.

    Args:
        logits: (B, K, h, w), any float dtype; computed in float32 or float64.
        labels: (B, H, W), any integer dtype, `IGNORED` or a class.
        over: Divisor of the sum. "all": the number of pixels, including ignored ones, as in the
            published runs (mmsegmentation's default). "labelled": the mean number per rank of
            labelled pixels in this micro-batch, found by a collective; averaging over the ranks
            then gives the mean over all labelled pixels.

    Returns: a scalar, float32 or float64; 0 if no pixel is labelled.
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

"""Loss and accuracy of logits, as sums that can be added over batches and ranks."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fd_large.data.centre_crops import NO_LABEL


def summed(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the mean cross-entropy of a batch, and sums over its images by name.

    The sums, float64 scalars, are "loss", "top1" and "top5" (correct images) and "images". The
    dictionary also has "predicted", (B,) int64, the most probable class of each image.

    Args:
        logits: (B, K) float32.
        labels: (B,) int64; images with `NO_LABEL` do not count.
    """
    counted = labels != NO_LABEL
    losses = F.cross_entropy(logits, labels, ignore_index=NO_LABEL, reduction="none")
    ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    best = ranked == labels[:, None]
    sums = {
        "loss": losses.sum(),
        "top1": best[:, 0].sum(),
        "top5": best.sum(),
        "images": counted.sum(),
    }
    totals = {name: value.double() for name, value in sums.items()}
    return losses.sum() / counted.sum().clamp(min=1), totals | {"predicted": ranked[:, 0]}


def averaged(sums: dict[str, Tensor]) -> dict[str, float]:
    """Returns the mean "loss", and "top1" and "top5" in per cent.

    All three are 0 if there are no images.

    Args:
        sums: The sums of `summed`, added over batches and ranks.
    """
    images = max(float(sums["images"]), 1.0)
    return {
        "loss": float(sums["loss"]) / images,
        "top1": 100 * float(sums["top1"]) / images,
        "top5": 100 * float(sums["top5"]) / images,
    }

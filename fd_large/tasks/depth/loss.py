"""The loss of depth: the scale-invariant difference of logarithms."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fd_large import distributed

Over = Literal["batch", "image"]


def silog_loss(
    log_depths: Tensor,
    depths: Tensor,
    *,
    over: Over = "batch",
    mean_share: float = 0.5,
    factor: float = 1.0,
) -> Tensor:
    """The root of mean d^2 - mean_share x (mean d)^2, d = log of true depth - log of predicted one.

    Args:
        log_depths: (B, H, W), natural logarithms of the predicted metres, float32 or float64.
        depths: (B, H, W), metres; 0 where there is none.
        over: What the means and the root are of. batch: all pixels with a depth, of the images of
            this pass on all ranks, as in MIM-Depth; a collective. image: those of one image;
            the loss is the mean over the images, as in mmsegmentation.
        mean_share: Share of the squared mean that is taken away, in [0, 1].
        factor: What the loss is multiplied by.

    Returns: a scalar of the dtype of `log_depths`, the same on all ranks for `batch`; images, or
        batches, without a depth have the loss 0.
    Source: Eigen et al., arXiv 1406.2283; utils/criterion.py of
        SwinTransformer/MIM-Depth-Estimation; `SiLogLoss` of mmsegmentation 1.2.
    """
    known = depths > 0
    difference = depths.where(known, 1).to(log_depths).log() - log_depths
    difference = difference.where(known, 0)
    # Sums of each image in float64: the mean of squares and the squared mean nearly cancel.
    of_image = torch.stack(
        [
            known.sum((1, 2)).double(),
            difference.sum((1, 2), dtype=torch.float64),
            difference.square().sum((1, 2), dtype=torch.float64),
        ]
    )
    if over == "image":
        loss = _root(*of_image, mean_share).mean()
    else:
        own = of_image.sum(1)
        whole = distributed.sum_tensor(own.detach().clone()).requires_grad_()
        with torch.enable_grad():
            root = _root(*whole, mean_share)
        # The root is of the sums of all ranks, and its slope in them is the slope in this rank's
        # own. The engine averages gradients over the ranks, where the root asks for their sum.
        (slope,) = torch.autograd.grad(root, whole)
        loss = root.detach() + distributed.world_size() * (slope * (own - own.detach())).sum()
    return (factor * loss).to(log_depths)


def _root(count: Tensor, total: Tensor, squares: Tensor, mean_share: float) -> Tensor:
    """The root of the sums of some pixels; 0, without a slope, where it has none."""
    mean = total / count.clamp(min=1)
    inside = squares / count.clamp(min=1) - mean_share * mean.square()
    return inside.where(inside > 0, 1).sqrt().where(inside > 0, 0)

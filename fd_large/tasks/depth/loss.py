"""The depth loss, the scale-invariant error of the logarithms of depths."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fd_large.ranks import distributed

Over = Literal["batch", "image"]


class Whole(NamedTuple):
    """Sums over all images of a step that has several micro-batches.

    A first pass over the micro-batches computes the sums, and the loss of the second pass uses
    them.

    Attributes:
        sums: (3,) float64, the sum of `silog_sums` over all images of the step.
        parts: Number of micro-batches in the step over all ranks. The engine averages their
            gradients.
    """

    sums: Tensor
    parts: int


def silog_sums(log_depths: Tensor, depths: Tensor) -> Tensor:
    """Returns, for each image, three sums over its pixels of known depth.

    The sums are in float64, because the mean of squares and the squared mean nearly cancel.

    Args:
        log_depths: (B, H, W), natural logarithms of the predicted depths in metres, float32 or
            float64.
        depths: (B, H, W), true depths in metres; 0 where the depth is unknown.

    Returns: (3, B) float64. The rows are the number of pixels, the sum of d, and the sum of d^2,
        where d is the logarithm of the true depth minus the logarithm of the predicted depth.
    """
    known = depths > 0
    difference = depths.where(known, 1).to(log_depths).log() - log_depths
    difference = difference.where(known, 0)
    return torch.stack(
        [
            known.sum((1, 2)).double(),
            difference.sum((1, 2), dtype=torch.float64),
            difference.square().sum((1, 2), dtype=torch.float64),
        ]
    )


def silog_loss(
    log_depths: Tensor,
    depths: Tensor,
    *,
    over: Over = "batch",
    mean_share: float = 0.5,
    factor: float = 1.0,
    whole: Whole | None = None,
) -> Tensor:
    """Returns factor x sqrt(mean d^2 - mean_share x (mean d)^2).

    d is the logarithm of the true depth minus the logarithm of the predicted depth, at each pixel
    with a known depth.

    Args:
        log_depths: (B, H, W), natural logarithms of the predicted depths in metres, float32 or
            float64.
        depths: (B, H, W), true depths in metres; 0 where the depth is unknown.
        over: Pixels over which the means are taken. "batch": all pixels of a step's images, as in
            MIM-Depth. "image": the pixels of one image; the loss is then averaged over the images,
            as in mmsegmentation.
        mean_share: Share of the squared mean that is subtracted, in [0, 1].
        factor: Factor of the loss.
        whole: For "batch", the sums over a step of several micro-batches. If None, the step is this
            micro-batch on all ranks, whose sums are added up by a collective.

    Returns: a scalar in the dtype of `log_depths`. For "batch" it is the same on all ranks. The
        loss of an image or a batch without a known depth is 0.
    Source: Eigen et al., arXiv 1406.2283; utils/criterion.py of
        SwinTransformer/MIM-Depth-Estimation; `SiLogLoss` of mmsegmentation 1.2.
    """
    of_image = silog_sums(log_depths, depths)
    if over == "image":
        loss = _root(*of_image, mean_share).mean()
    else:
        local_sums = of_image.sum(1)
        if whole is None:
            whole = Whole(distributed.sum_tensor(local_sums), distributed.world_size())
        totals = whole.sums.clone().requires_grad_()
        with torch.enable_grad():
            root = _root(*totals, mean_share)
        # The root is taken of the step's sums, and its slope in them is the slope in the sums of
        # this part. The engine averages gradients over the parts; the root needs their sum.
        (slope,) = torch.autograd.grad(root, totals)
        loss = root.detach() + whole.parts * (slope * (local_sums - local_sums.detach())).sum()
    return (factor * loss).to(log_depths)


def _root(count: Tensor, total: Tensor, squares: Tensor, mean_share: float) -> Tensor:
    """Returns sqrt(mean d^2 - mean_share x (mean d)^2) from sums over pixels.

    Where the radicand is not above 0, the result and its gradient are 0.

    Args:
        count: Number of pixels.
        total: Sum of the differences d over these pixels.
        squares: Sum of d^2 over these pixels.
        mean_share: Share of the squared mean that is subtracted, in [0, 1].
    """
    mean = total / count.clamp(min=1)
    inside = squares / count.clamp(min=1) - mean_share * mean.square()
    return inside.where(inside > 0, 1).sqrt().where(inside > 0, 0)

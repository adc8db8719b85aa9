"""The loss of depth: the scale-invariant difference of logarithms."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fd_large.ranks import distributed

Over = Literal["batch", "image"]


class Whole(NamedTuple):
    """The sums of a whole step, known before its second pass.

    Attributes:
        sums: (3,) float64, `silog_sums` over all images of the step.
        parts: Number of micro batches on all ranks, whose gradients the engine averages.
    """

    sums: Tensor
    parts: int


def silog_sums(log_depths: Tensor, depths: Tensor) -> Tensor:
    """Returns number, sum and sum of squares of each image's differences d, (3, B) float64.

    The sums are in float64, because the mean of squares and the squared mean nearly cancel. The
    differences d are defined in `silog_loss`.

    Args:
        log_depths: (B, H, W), natural logarithms of the predicted metres, float32 or float64.
        depths: (B, H, W), metres; 0 where the depth is unknown.
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
    """Returns sqrt(mean d^2 - mean_share x (mean d)^2), d = log true depth - log predicted depth.

    Args:
        log_depths: (B, H, W), natural logarithms of the predicted metres, float32 or float64.
        depths: (B, H, W), metres; 0 where the depth is unknown.
        over: Pixels of the means and the root. batch: all pixels with a depth in a step's images,
            as in MIM-Depth. image: the pixels of one image; the loss is the mean over images, as
            in mmsegmentation.
        mean_share: Share of the squared mean that is taken away, in [0, 1].
        factor: Factor of the loss.
        whole: The sums over a step of several micro batches, for `batch`. None: this micro batch,
            on all ranks, is the step; a collective.

    Returns: a scalar of the dtype of `log_depths`, the same on all ranks for `batch`; images, or
        batches, without a depth have the loss 0.
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
    """Returns the root from sums over pixels; 0, with no gradient, unless its square is above 0."""
    mean = total / count.clamp(min=1)
    inside = squares / count.clamp(min=1) - mean_share * mean.square()
    return inside.where(inside > 0, 1).sqrt().where(inside > 0, 0)

"""Batch normalisation over groups of neighbouring images of the global batch.

In training each channel is normalised by the mean and variance over a group of images, whichever
ranks and micro-batches hold these images. Sums over the positions of an image's map are taken
first, in float32, and added over the images of a group in float64, so that the number of ranks
changes only float64 rounding. Running statistics are updated once in each step that is not skipped,
by the means and unbiased variances of the step's groups, averaged over the images of the step.

A norm records the statistics of a step in the norm's backward. Backward runs once for each forward,
even if the forward is recomputed. Backward does not run for an evaluation, for another forward that
belongs to no step, or for the first pass of a step that repeats its forwards in a second pass. If
neither input nor parameters of a norm need gradients, the statistics are recorded in the training
forward.

Source: Ioffe and Szegedy, arXiv 1502.03167.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import lcm
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from fd_large.backbones.float32_buffers import Float32Buffers
from fd_large.ranks import distributed

PASS = -1
"""The value of a group's size for a single group of all images of a pass, on all ranks."""
# torch's defaults, with which published heads were trained.
EPS, MOMENTUM = 1e-5, 0.1


class Groups:
    """The division of a batch into groups of images, shared by all batch norms of a model.

    Args:
        size: Number of images in a group. 0: no groups, so that training also uses the running
            statistics. PASS: the images of one micro-batch of every rank are one group.

    Attributes:
        images: Number of images in the present forward. It is needed for a model whose norms may
            get more than the images along their first dimension, for example windows. With 0 the
            length of the first dimension is the number of images.
    """

    def __init__(self, size: int = 0) -> None:
        self.size, self.images = size, 0
        self._first, self._number = 0, 0
        self._over_ranks = size == PASS
        self._ranks: Any = None

    def lie_in(self, global_batch: int, micro_batch: int) -> None:
        """Lets groups span several ranks, if necessary and possible; a collective.

        Groups span ranks if the size of a group does not divide `micro_batch`, and each rank has a
        single micro-batch in a step. In all other cases each micro-batch begins with a new group.

        Args:
            global_batch: Number of images in a step, over all ranks; a multiple of the group's
                size.
            micro_batch: Number of images in a micro-batch of one rank.
        """
        whole_share = micro_batch * distributed.world_size() == global_batch
        if self.size <= 0 or micro_batch % self.size == 0 or not whole_share:
            return
        span = lcm(self.size, micro_batch)  # Images of the fewest ranks that hold whole groups.
        ranks = span // micro_batch
        self._first = distributed.rank() % ranks * micro_batch
        self._number = span // self.size
        self._over_ranks = ranks > 1
        if 1 < ranks < distributed.world_size():
            self._ranks = distributed.neighbours(ranks)

    def of(self, images: int, device: torch.device) -> Tensor:
        """Returns the group of each image of a micro-batch, as its row in the result of `sums`.

        Args:
            images: B, the number of images in the micro-batch of this rank.
            device: Device of the result.

        Returns: (B,) int64.
        """
        if self.size == PASS:
            return torch.zeros(images, dtype=torch.int64, device=device)
        return (torch.arange(images, device=device) + self._first) // self.size

    def sums(self, of_images: Tensor) -> Tensor:
        """Sums values over the images of each group, and returns (number of groups, K) float64.

        If groups span ranks, the sums include the images of other ranks, and this method is a
        collective.

        Args:
            of_images: (B, K) float64, the values of each image of this rank's micro-batch.
        """
        images, before = len(of_images), self._first % self.size
        number = -(-(before + images) // self.size) if self.size != PASS else 1
        if number == 1:
            table = of_images.sum(0, keepdim=True)
        else:  # Zeros stand for the images of a group that other ranks have.
            padded = F.pad(of_images, (0, 0, before, number * self.size - before - images))
            table = padded.unflatten(0, (number, self.size)).sum(1)
        if self._number:
            before = self._first // self.size
            after = self._number - before - number
            table = F.pad(table, (0, 0, before, after))  # Rows of groups of other ranks alone.
        return distributed.sum_tensor(table, self._ranks) if self._over_ranks else table


class BatchNorm(Float32Buffers):
    """Batch norm of maps; by default one group is the images of one micro-batch of every rank.

    If each rank has one micro-batch in a step, the result of the step therefore does not depend on
    the number of ranks. Otherwise each micro-batch has its own statistics.

    Args:
        width: Number of channels, C.
    """

    eps, momentum = EPS, MOMENTUM

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.norm_groups = Groups(PASS)
        self.seen: Tensor | None = None  # (2 C + 1,) float64, see `_note`.

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x`, (B, C, H, W), and keeps its shape and dtype; a collective in training."""
        return normalised(self, x)


def adopt(net: nn.Module) -> Groups:
    """Makes the batch norms of `net`, torch's or timm's, normalise by groups; returns the `Groups`.

    The modules keep their names and classes, and timm's norms also their dropout and activation.
    Until `size` of the groups is set, the norms use their running statistics.
    """
    groups = Groups()
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            module.norm_groups, module.seen = groups, None
            module.forward = partial(normalised, module)
    return groups


def norms_of(net: nn.Module) -> list[Any]:
    """Returns the batch norms of `net` that normalise by groups (attribute `norm_groups`)."""
    return [module for module in net.modules() if hasattr(module, "norm_groups")]


def statistics_of(net: nn.Module) -> dict[str, Tensor]:
    """Returns {name in `net`: tensor} of the running means and variances of batch norms.

    Only batch norms that normalise by groups (attribute `norm_groups`) are included.
    """
    return {
        f"{path}.{name}": getattr(module, name)
        for path, module in net.named_modules()
        if hasattr(module, "norm_groups")
        for name in ("running_mean", "running_var")
    }


@torch.compiler.disable
def normalised(norm: Any, x: Tensor) -> Tensor:
    """Applies a batch norm to `x`, computing in float32, or in float64 for a float64 `x`.

    The result has the shape and dtype of `x`. In training, the statistics of groups of images are
    used, if the size of the groups is not 0. Otherwise the running statistics are used. The dropout
    and activation of timm's norms follow.

    Args:
        norm: Module with weight, bias, running_mean, running_var and eps. Its `norm_groups` is the
            `Groups`, and its `seen` has the recorded statistics (see `_note`).
        x: (B, C, ...).
    """
    wide = x.dtype if x.dtype == torch.float64 else torch.float32
    if norm.training and norm.norm_groups.size:
        # Copies: under ZeRO-3 the parameters themselves are empty again after this forward.
        weight, bias = (
            torch.full_like(norm.running_mean, value, dtype=wide)
            if parameter is None
            else parameter.to(wide, copy=True)
            for parameter, value in ((norm.weight, 1.0), (norm.bias, 0.0))
        )
        y = _Normalise.apply(x, weight, bias, norm, torch.is_grad_enabled())
    else:
        # In float32: bfloat16 variances would be wrong by up to 0.4 %.
        y = F.batch_norm(
            x.to(wide),
            norm.running_mean.to(wide),
            norm.running_var.to(wide),
            None if norm.weight is None else norm.weight.to(wide),
            None if norm.bias is None else norm.bias.to(wide),
            eps=norm.eps,
        ).to(x.dtype)
    for name in ("drop", "act"):
        after = getattr(norm, name, None)
        y = y if after is None else after(y)
    return y


class _Normalise(torch.autograd.Function):
    """Computes (x - mean) / sqrt(variance + eps) * weight + bias by the statistics of groups.

    Of all tensors as large as x, only x itself is saved for backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: Any, learns: bool
    ) -> Tensor:
        groups: Groups = norm.norm_groups
        rows = _by_image(x, groups.images or len(x)).to(weight.dtype)
        images, width = rows.shape[0], rows.shape[2]
        variance, mean = (each.double() for each in torch.var_mean(rows, (1, 3), correction=0))
        places = mean.new_full((images, 1), rows[0].numel() // width)
        of_images = torch.cat([mean, variance + mean.square(), torch.ones_like(places)], 1) * places
        first, second, count = groups.sums(of_images).split([width, width, 1], 1)
        count = count.clamp(min=1)  # A trial may have no image of a group.
        mean = first / count
        variance = (second / count - mean.square()).clamp(min=0)
        inverse = (variance + norm.eps).rsqrt().to(rows.dtype)
        ctx.statistics = torch.cat([mean, variance * count / (count - 1).clamp(min=1)], 1)
        mean = mean.to(rows.dtype)
        ctx.save_for_backward(x, weight, mean, inverse, count)
        ctx.norm, ctx.images = norm, images
        group = groups.of(images, x.device)
        scale = inverse * weight
        shift = bias - mean * scale
        # Written into a tensor that is no view: activations in place may follow.
        y = torch.empty(x.shape, dtype=rows.dtype, device=x.device)
        shift, scale = (each[group][:, None, :, None] for each in (shift, scale))
        torch.addcmul(shift, rows, scale, out=_by_image(y, images))
        if learns and not any(ctx.needs_input_grad):  # No backward follows.
            _note(ctx)
        return y.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, mean, inverse, count = ctx.saved_tensors
        groups: Groups = ctx.norm.norm_groups
        rows, gradients = (_by_image(t, ctx.images).to(weight.dtype) for t in (x, gradient))
        group = groups.of(ctx.images, x.device)
        mean, inverse = (each[group][:, None, :, None] for each in (mean, inverse))
        normal = (rows - mean) * inverse
        of_bias = gradients.sum((1, 3)).double()
        of_weight = (gradients * normal).sum((1, 3)).double()
        # The losses of all ranks depend on this rank's x through mean and variance. The engine
        # averages gradients of parameters, so those of weight and bias stay this rank's own.
        means = (groups.sums(torch.cat([of_bias, of_weight], 1)) / count).to(rows.dtype)
        first, second = (each[group][:, None, :, None] for each in means.chunk(2, 1))
        of_x = (gradients - first - normal * second) * (inverse * weight[None, None, :, None])
        _note(ctx)
        return (
            of_x.to(x.dtype).view(x.shape),
            of_weight.sum(0).to(weight.dtype),
            of_bias.sum(0).to(weight.dtype),
            None,
            None,
        )


def _note(ctx: Any) -> None:
    """Adds the statistics of this rank's images in a forward to the norm's `seen`, (2C + 1,).

    `seen` has the sum over images of the mean (C) and the unbiased variance (C) of each image's
    group, and the number of images.

    Args:
        ctx: Autograd context of `_Normalise`, with the norm and the statistics of the forward.
    """
    groups: Groups = ctx.norm.norm_groups
    sums = ctx.statistics[groups.of(ctx.images, ctx.statistics.device)].sum(0)
    noted = torch.cat([sums, sums.new_full((1,), ctx.images)])
    before = ctx.norm.seen
    ctx.norm.seen = noted if before is None else before + noted


def _by_image(x: Tensor, images: int) -> Tensor:
    """Reshapes `x` from (B', C, ...) to (B, B' / B, C, positions), where B is `images`.

    B' is a multiple of B, the number of images, if a model has flattened other dimensions into the
    first.
    """
    return x.reshape(images, len(x) // images, x.shape[1], -1)


def forget(norms: Sequence[Any]) -> None:
    """Discards the statistics that `norms` have recorded, such as those of a skipped step."""
    for norm in norms:
        norm.seen = None


@torch.no_grad()
def move(norms: Sequence[Any]) -> None:
    """Updates the running statistics of `norms` by the statistics recorded in a step; a collective.

    Norms without recorded statistics stay unchanged. The recorded statistics are discarded.
    """
    norms = [norm for norm in norms if norm.seen is not None]
    if not norms:
        return
    total = distributed.sum_tensor(torch.cat([norm.seen for norm in norms]))
    for norm, sums in zip(norms, total.split([norm.seen.numel() for norm in norms]), strict=True):
        mean, variance = (sums[:-1] / sums[-1]).chunk(2)
        norm.running_mean.lerp_(mean.to(norm.running_mean), norm.momentum)
        norm.running_var.lerp_(variance.to(norm.running_var), norm.momentum)
    forget(norms)

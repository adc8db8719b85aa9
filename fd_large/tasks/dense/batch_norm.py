"""Batch normalisation over the images of a pass on all ranks.

torch's SyncBatchNorm runs on GPUs alone, and both of torch's norms change their running statistics
in the forward pass, so that a step that is refused afterwards would have changed them. Here a
forward in training only notes the statistics of its batch; the step that the engine takes
moves the running ones, once.

Source: Ioffe and Szegedy, arXiv 1502.03167.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fd_large.engine.float32_buffers import Float32Buffers
from fd_large.ranks import distributed

# torch's defaults, with which the published heads were trained.
EPS, MOMENTUM = 1e-5, 0.1
_PLACES = (0, 2, 3)


class BatchNorm(Float32Buffers):
    """Normalises each channel over images and places; float32 whatever the dtype of the map.

    In training, by the mean and variance of the images of this pass on all ranks, so that a step of
    one pass does not depend on their number. A step of several passes has the statistics of each
    pass by itself. In evaluation, by the running statistics.

    Args:
        width: C.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self._noted: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to the same shape and dtype; in training a collective."""
        wide = torch.promote_types(x.dtype, torch.float32)
        # Copies: under ZeRO-3 the parameters themselves are empty again after this forward.
        weight, bias = (p.to(wide, copy=True) for p in (self.weight, self.bias))
        if self.training:
            y, mean, variance = _Normalise.apply(x, weight, bias)
            if torch.is_grad_enabled():  # Else another pass over the same images follows, or none.
                self._noted.append((mean, variance))
            return y
        scale = weight * (self.running_var.to(wide) + EPS).rsqrt()
        shift = bias - self.running_mean.to(wide) * scale
        return (x.to(wide) * scale[:, None, None] + shift[:, None, None]).to(x.dtype)

    def forget(self) -> None:
        """Drops the statistics that were noted since the last step."""
        self._noted.clear()

    @torch.no_grad()
    def move(self) -> None:
        """Moves the running statistics by the mean of what the passes of a step noted."""
        if self._noted:
            of_passes = (torch.stack(kind).mean(0) for kind in zip(*self._noted, strict=True))
            for running, noted in zip(
                (self.running_mean, self.running_var), of_passes, strict=True
            ):
                running.lerp_(noted.to(running.dtype), MOMENTUM)
        self.forget()


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias, over all ranks.

    Of x-sized tensors only x itself is kept for backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        wide = x.to(weight.dtype)
        places = wide.new_full((1,), x.numel() / x.shape[1])
        *sums, count = distributed.sum_tensor(torch.cat([wide.sum(_PLACES), places])).split(
            x.shape[1]
        )
        mean = sums[0] / count
        centred = wide - mean[:, None, None]
        squares = distributed.sum_tensor(centred.square().sum(_PLACES))
        inverse = (squares / count + EPS).rsqrt()
        ctx.save_for_backward(x, weight, mean, inverse, count)
        y = centred * (inverse * weight)[:, None, None] + bias[:, None, None]
        unbiased = squares / (count - 1).clamp(min=1)
        ctx.mark_non_differentiable(mean, unbiased)
        return y.to(x.dtype), mean, unbiased

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        x, weight, mean, inverse, count = ctx.saved_tensors
        gradient = gradient.to(weight.dtype)
        normal = (x.to(weight.dtype) - mean[:, None, None]) * inverse[:, None, None]
        of_bias = gradient.sum(_PLACES)
        of_weight = (gradient * normal).sum(_PLACES)
        # The losses of all ranks depend on this rank's x through mean and variance. The engine
        # averages the gradients of parameters over the ranks, so those of weight and bias stay
        # this rank's own.
        means = distributed.sum_tensor(torch.stack([of_bias, of_weight])) / count
        own = gradient - means[0][:, None, None] - normal * means[1][:, None, None]
        return (own * (inverse * weight)[:, None, None]).to(x.dtype), of_weight, of_bias

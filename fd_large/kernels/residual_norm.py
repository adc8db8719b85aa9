"""LayerNorm, and the post-norm residual y = x + scale * LayerNorm(branch); not RMS or batch norm.

Statistics are float32 always (float64 in a float64 run). Under ZeRO-3 a weight is whole only
inside its own module's forward, so the modules that own these weights call the functions here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.kernels import choose


def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """LayerNorm over the last dimension.

    Args:
        x: (..., C), any float dtype.
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        dtype: Of the result; None: that of x.

    Returns: (..., C).
    """
    dtype = dtype or x.dtype
    if x.dtype == weight.dtype == dtype:
        # The kernels behind both calls keep float32 statistics for half-precision inputs.
        if choose.implementation(x.device.type) == "apex":
            return choose.apex_layer_norm()(x, weight, bias, weight.shape, eps)
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return _wide_layer_norm(x, weight, bias, eps).to(dtype)


def residual_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
) -> Tensor:
    """Adds a normalised branch to the residual stream: x + scale * LayerNorm(branch).

    Args:
        x: (B, ..., C), the stream; the result has its dtype.
        branch: (B, ..., C), any float dtype.
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        scale: (B,) float32, drop path's factor per sample; None: 1.

    Returns: (B, ..., C).
    """
    return residual_norm_reference(x, branch, weight, bias, eps, scale)


def residual_norm_reference(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
) -> Tensor:
    """The plain twin of `residual_norm`: norm, scale, sum in float32, one rounding at the end."""
    normed = _wide_layer_norm(branch, weight, bias, eps)
    if scale is not None:
        normed = normed * scale.view(-1, *[1] * (x.dim() - 1)).to(normed.dtype)
    return (x + normed).to(x.dtype)


def _wide_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)

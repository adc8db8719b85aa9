"""Layers that the backbones share; each fills its own parameters and never those of a child."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.initialization import Draw, Scheme, fill
from fd_large.kernels.add_norm import add_norm
from fd_large.kernels.quick_gelu import quick_gelu
from fd_large.kernels.residual_norm import layer_norm, residual_norm, stream_norm, takes_bias


class Linear(nn.Linear):
    """A linear layer with a stated initial distribution; its bias starts at 0.

    Inputs are cast to the dtype of the weight: the residual stream may be wider.
    """

    def __init__(self, in_features: int, out_features: int, *, draw: Draw, bias: bool = True):
        # Before the base constructor, which calls reset_parameters.
        self.draw = draw
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Draws the weight again and zeroes the bias."""
        fill(self.weight, self.draw)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Maps (..., in) to (..., out); `bias` (out,) is for a layer without its own."""
        bias = self.bias if bias is None else bias
        return F.linear(x.to(self.weight.dtype), self.weight, bias)


class BranchEnd(Linear):
    """The last linear layer of a branch; the following norm may add its bias.

    With fused kernels that saves the bias's gradient a pass of its own.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps (..., in) to (..., out), and returns a bias (out,) still to be added, or None."""
        x = x.to(self.weight.dtype)
        if takes_bias(x, self.out_features):
            # A copy: under ZeRO-3 the parameter itself is empty again once this forward is over.
            return F.linear(x, self.weight), self.bias.clone()
        return F.linear(x, self.weight, self.bias), None


class Float32Linear(Linear):
    """A linear layer computed in float32 whatever the dtype of its weights, autocast or not."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Maps (..., in) to (..., out) in float32 (float64 in a float64 run)."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        bias = self.bias if bias is None else bias
        # The meta device knows no autocast.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            return F.linear(
                x.to(wide), self.weight.to(wide), None if bias is None else bias.to(wide)
            )


class LayerNorm(nn.Module):
    """LayerNorm over channels with float32 statistics and a chosen output dtype."""

    def __init__(self, width: int, eps: float, *, initial_weight: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.eps, self.initial_weight = eps, initial_weight
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the initial weight, and bias 0."""
        nn.init.constant_(self.weight, self.initial_weight)
        nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, dtype: torch.dtype | None = None, copy: torch.dtype | None = None
    ) -> Any:
        """Normalises (..., C); the result has `dtype`, by default that of x.

        With a dtype `copy` it returns a pair: the result, and the same values in that dtype.
        """
        if copy is None:
            return layer_norm(x, self.weight, self.bias, self.eps, dtype=dtype)
        return stream_norm(x, self.weight, self.bias, self.eps, dtype=dtype, copy=copy)


class ResidualNorm(LayerNorm):
    """The post-norm residual of SwinV2: one module, so that ZeRO-3 gathers the norm's weight."""

    def forward(
        self,
        x: Tensor,
        branch: tuple[Tensor, Tensor | None],
        scale: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Returns x + scale * LayerNorm(branch), (B, ..., C), in the dtype of x and in `dtype`.

        The branch is the result of `BranchEnd`.
        """
        values, rest = branch
        return residual_norm(
            x, values, self.weight, self.bias, self.eps, scale, copy=dtype, branch_bias=rest
        )


class AddNorm(LayerNorm):
    """A pre-norm residual with the norm after it: one module, so that ZeRO-3 gathers the weight."""

    def forward(
        self,
        x: Tensor,
        branch: Tensor,
        scale: Tensor | None,
        gamma: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Returns y = x + scale * gamma * branch, (B, ..., C), and LayerNorm(y) in `dtype`."""
        return add_norm(x, branch, self.weight, self.bias, self.eps, scale, gamma, dtype=dtype)


class PatchEmbed(nn.Module):
    """Cuts images into patches and maps each to a token: convolution, then optionally a norm."""

    def __init__(
        self,
        embed_dim: int,
        *,
        patch_size: int,
        in_chans: int,
        scheme: Scheme,
        bias: bool = True,
        norm_eps: float | None = None,
    ):
        super().__init__()
        self.proj = PatchConvolution(in_chans, embed_dim, patch_size, bias=bias, scheme=scheme)
        self.norm = None if norm_eps is None else LayerNorm(embed_dim, norm_eps)

    def forward(self, images: Tensor, dtype: torch.dtype, copy: torch.dtype | None = None) -> Any:
        """Maps (B, 3, H, W) to (B, H/p, W/p, C) of `dtype`; a remainder of pixels is dropped.

        With a dtype `copy` it returns a pair: the result, and the same values in that dtype.
        """
        x = self.proj(images).permute(0, 2, 3, 1)
        if self.norm is not None:
            return self.norm(x, dtype, copy)
        return x.to(dtype) if copy is None else (x.to(dtype), x.to(copy))


class PatchConvolution(nn.Conv2d):
    """The convolution of the patch embedding, with a stated initial distribution."""

    def __init__(
        self, in_chans: int, embed_dim: int, patch_size: int, *, bias: bool, scheme: Scheme
    ):
        self.scheme = scheme
        super().__init__(in_chans, embed_dim, patch_size, stride=patch_size, bias=bias)

    def reset_parameters(self) -> None:
        """Draws weight and bias again."""
        fill(self.weight, self.scheme.convolution)
        if self.bias is not None:
            fan_in = self.in_channels * math.prod(self.kernel_size)
            fill(self.bias, self.scheme.convolution_bias, fan_in)

    def forward(self, images: Tensor) -> Tensor:
        """Maps (B, in, H, W) to (B, C, H/p, W/p) in the dtype of the weight."""
        # Channels last, because tokens are: the map is then no copy of the convolution's result.
        images = images.to(self.weight.dtype, memory_format=torch.channels_last)
        return super().forward(images)


Activation = Literal["gelu", "quick_gelu"]
_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
}


class Mlp(nn.Module):
    """Linear, activation, linear.

    Args:
        width: C.
        hidden: Channels between the two linear layers.
        draw: Initial distribution of the first layer's weight.
        end: Initial distribution of the last layer's weight.
        activation: "gelu" or "quick_gelu".
        last: Class of the last layer, whose result the MLP returns.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        draw: Draw,
        end: Draw,
        activation: Activation = "gelu",
        last: type[Linear] = Linear,
    ):
        super().__init__()
        self.fc1 = Linear(width, hidden, draw=draw)
        self.activation = _ACTIVATIONS[activation]
        self.fc2 = last(hidden, width, draw=end)

    def forward(self, x: Tensor) -> Any:
        """Maps (..., C) to (..., C)."""
        return self.fc2(self.activation(self.fc1(x)))


def residual_dtype(choice: Literal["float32", "compute"], compute: torch.dtype) -> torch.dtype:
    """Returns the dtype of the residual stream: the products' dtype, or at least float32."""
    return compute if choice == "compute" else torch.promote_types(compute, torch.float32)

"""Layers that the backbones share; each fills its own parameters and never a child's."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.errors import ConfigError, nearest
from fd_large.kernels.residual_norm import add_norm, layer_norm, residual_norm
from fd_large.models.initialization import Draw, Scheme, fill


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
        """Maps (..., in) to (..., out); `bias` (out,) stands in for a layer that owns none."""
        bias = self.bias if bias is None else bias
        return F.linear(x.to(self.weight.dtype), self.weight, bias)


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

    def forward(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Normalises (..., C); the result has `dtype`, by default that of x."""
        return layer_norm(x, self.weight, self.bias, self.eps, dtype=dtype)


class ResidualNorm(LayerNorm):
    """The post-norm residual of SwinV2 in one module, so that its weight is whole where used."""

    def forward(
        self, x: Tensor, branch: Tensor, scale: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Returns x + scale * LayerNorm(branch), (B, ..., C), in the dtype of x and in `dtype`."""
        return residual_norm(x, branch, self.weight, self.bias, self.eps, scale, copy=dtype)


class AddNorm(LayerNorm):
    """A pre-norm residual and the norm that follows it, in one module for the same reason."""

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

    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Maps (B, 3, H, W) to (B, H/p, W/p, C) of `dtype`; a remainder of pixels is dropped."""
        x = self.proj(images).permute(0, 2, 3, 1)
        return x.to(dtype) if self.norm is None else self.norm(x, dtype)


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
        return super().forward(images.to(self.weight.dtype))


class Mlp(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, width: int, hidden: int, *, draw: Draw, end: Draw, activation: str = "gelu"):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation: no such function; got {activation!r}, "
                f"{nearest(activation, ACTIVATIONS)}. Use one of these."
            )
        self.fc1 = Linear(width, hidden, draw=draw)
        self.fc2 = Linear(hidden, width, draw=end)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., C) to (..., C)."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


def residual_dtype(choice: str, compute: torch.dtype) -> torch.dtype:
    """Returns the dtype of the residual stream: that of the products, or float32 at least.

    Raises: ConfigError: if the choice is neither "compute" nor "float32".
    """
    if choice not in ("compute", "float32"):
        raise ConfigError(
            f"student.residual_dtype: no such choice; got {choice!r}, expected 'compute' or "
            "'float32'. Use one of these."
        )
    return compute if choice == "compute" else torch.promote_types(compute, torch.float32)

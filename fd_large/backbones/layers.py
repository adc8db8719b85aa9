"""Layers that the backbones share; each initialises its own parameters, never those of a child."""

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
    """Linear layer whose weight is drawn from a given distribution, and whose bias starts at 0.

    Inputs are cast to the dtype of the weight, since the residual stream may be wider.
    """

    def __init__(self, in_features: int, out_features: int, *, draw: Draw, bias: bool = True):
        # Before the base constructor, which calls reset_parameters.
        self.draw = draw
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Draws the weight again and sets the bias to 0."""
        fill(self.weight, self.draw)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Maps `x` from (..., in) to (..., out).

        The result is in the dtype of the weight. If `bias` (out,) is given, it replaces the layer's
        own bias.
        """
        bias = self.bias if bias is None else bias
        return F.linear(x.to(self.weight.dtype), self.weight, bias)


class BranchEnd(Linear):
    """The last linear layer of a residual branch, which may leave its bias to the norm after it.

    If the fused kernel of the norm adds the bias, this kernel also computes the gradient of the
    bias, which otherwise needs another pass over the gradient of the output.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps `x` from (..., in) to (..., out).

        Returns: the result; and the bias (out,) that the norm after this layer still has to add to
            it. The bias is left to the norm if the norm's fused kernel can add it (`takes_bias`).
            Otherwise this layer adds the bias, and None is returned in its place.
        """
        x = x.to(self.weight.dtype)
        if takes_bias(x, self.out_features):
            # A copy: under ZeRO-3 the parameter itself is empty again once this forward is over.
            return F.linear(x, self.weight), self.bias.clone()
        return F.linear(x, self.weight, self.bias), None


class Float32Linear(Linear):
    """Linear layer that computes in float32 or wider, also with a 16-bit weight and in autocast."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Maps `x` from (..., in) to (..., out) in float32, or in float64 if the weight is float64.

        If `bias` (out,) is given, it replaces the layer's own bias.
        """
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
        """Sets the weight to its initial value and the bias to 0."""
        nn.init.constant_(self.weight, self.initial_weight)
        nn.init.zeros_(self.bias)

    def forward(
        self, x: Tensor, dtype: torch.dtype | None = None, copy: torch.dtype | None = None
    ) -> Any:
        """Normalises `x`, (..., C), over its channels.

        Args:
            x: (..., C).
            dtype: Dtype of the result; None keeps the dtype of `x`.
            copy: Dtype of a second result with the same values; None returns one result.

        Returns: the result, or with `copy` the pair of both results.
        """
        if copy is None:
            return layer_norm(x, self.weight, self.bias, self.eps, dtype=dtype)
        return stream_norm(x, self.weight, self.bias, self.eps, dtype=dtype, copy=copy)


class ResidualNorm(LayerNorm):
    """LayerNorm of a residual branch and its addition to the residual stream (SwinV2's post-norm).

    Norm and addition are one module, so that ZeRO-3 gathers the norm's weight before the kernel
    that computes both.
    """

    def forward(
        self,
        x: Tensor,
        branch: tuple[Tensor, Tensor | None],
        scale: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Returns x + scale * LayerNorm(branch), (B, ..., C), in the dtype of x and in `dtype`.

        Args:
            x: (B, ..., C), the residual stream.
            branch: Result (B, ..., C) of the residual branch, and a bias (C,) that is still to be
                added to it, or None.
            scale: (B,), drop path's factors; None without drop path.
            dtype: Dtype of the second result.
        """
        values, rest = branch
        return residual_norm(
            x, values, self.weight, self.bias, self.eps, scale, copy=dtype, branch_bias=rest
        )


class AddNorm(LayerNorm):
    """Adds a residual branch to the residual stream, then computes a LayerNorm (pre-norm blocks).

    Addition and norm are one module, so that ZeRO-3 gathers the norm's weight before the kernel
    that computes both.
    """

    def forward(
        self,
        x: Tensor,
        branch: Tensor,
        scale: Tensor | None,
        gamma: Tensor | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Returns y = x + scale * gamma * branch, (B, ..., C), and LayerNorm(y) in `dtype`.

        Args:
            x: (B, ..., C), the residual stream.
            branch: (B, ..., C), the result of the residual branch.
            scale: (B,), drop path's factors; None without drop path.
            gamma: (C,), the layer scale, or None.
            dtype: Dtype of the second result.
        """
        return add_norm(x, branch, self.weight, self.bias, self.eps, scale, gamma, dtype=dtype)


class PatchEmbed(nn.Module):
    """Maps each patch of an image to a token, by a convolution and optionally a norm."""

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
        """Maps images to tokens, (B, H/p, W/p, C), and drops pixels beyond whole patches of side p.

        Args:
            images: (B, 3, H, W), normalised images.
            dtype: Dtype of the result.
            copy: Dtype of a second result with the same values; None returns one result.

        Returns: the result, or with `copy` the pair of both results.
        """
        x = self.proj(images).permute(0, 2, 3, 1)
        if self.norm is not None:
            return self.norm(x, dtype, copy)
        return x.to(dtype) if copy is None else (x.to(dtype), x.to(copy))


class PatchConvolution(nn.Conv2d):
    """The convolution of the patch embedding, drawn from the distributions of a scheme."""

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
        """Maps `images` from (B, in, H, W) to (B, C, H/p, W/p), for patches of side p.

        The result is in the dtype of the weight.
        """
        # Channels last, because tokens are: the map is then no copy of the convolution's result.
        images = images.to(self.weight.dtype, memory_format=torch.channels_last)
        return super().forward(images)


Activation = Literal["gelu", "quick_gelu"]
_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
}


class Mlp(nn.Module):
    """MLP of two linear layers with an activation between them.

    Args:
        width: Number of channels, C.
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
        """Maps `x` from (..., C) to (..., C).

        If the last layer is a `BranchEnd`, the result is a pair: the mapped tensor, and the bias
        (C,) that is still to be added to it, or None if no bias is left to add.
        """
        return self.fc2(self.activation(self.fc1(x)))


def residual_dtype(choice: Literal["float32", "compute"], compute: torch.dtype) -> torch.dtype:
    """Returns the dtype of the residual stream.

    Args:
        choice: "compute" for the dtype `compute`; "float32" for the wider of `compute` and float32.
        compute: Dtype of the matrix products.
    """
    return compute if choice == "compute" else torch.promote_types(compute, torch.float32)

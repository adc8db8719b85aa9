"""Convolutions of pyramids and heads, each of which initialises only its own weights.

torchvision's pyramid and heads initialise their children's weights in the parent's constructor.
Under `deepspeed.zero.Init` these weights are then already sharded over the ranks, so that the
initial values would be lost. Therefore each Module here initialises only the parameters that it
owns.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.initialization import Draw, fill
from fd_large.backbones.layers import LayerNorm

NORM_EPS = 1e-6


def he_normal(out_channels: int, kernel_size: int) -> Draw:
    """Returns Kaiming's normal distribution by fan-out, as in detectron2, for layers before a ReLU.

    Args:
        out_channels: Number of output channels.
        kernel_size: Side of the kernel.
    """
    return Draw("normal", std=math.sqrt(2 / (out_channels * kernel_size**2)))


def he_uniform() -> Draw:
    """Returns Kaiming's uniform distribution, +-sqrt(3 / fan-in), for layers without a ReLU."""
    return Draw("fan_in_uniform", divide=1 / math.sqrt(3))


def at_least_float32(x: Tensor) -> Tensor:
    """Converts a tensor to float32, for losses; a float64 tensor is returned unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Convolution(nn.Conv2d):
    """A convolution whose output has the size of its input.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel, an odd number.
        draw: Distribution of the weight.
        bias: Whether the convolution has a bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        draw: Draw,
        bias: bool = True,
    ):
        # Before the base constructor, which calls reset_parameters.
        self.draw = draw
        padding = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, padding=padding, bias=bias)

    def reset_parameters(self) -> None:
        """Draws a new weight, and sets the bias to zero."""
        fill(self.weight, self.draw)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output (B, out, H, W) for a map (B, in, H, W), in the weight's data type."""
        return super().forward(x.to(self.weight.dtype))


class Doubling(nn.ConvTranspose2d):
    """A transposed convolution that doubles the sides of a map.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        draw: Distribution of the weight.
        kernel_size: Side of the kernel: 2, 3 or 4.
        bias: Whether the convolution has a bias.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        draw: Draw,
        kernel_size: int = 2,
        bias: bool = True,
    ):
        # Before the base constructor, which calls reset_parameters.
        self.draw = draw
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=2,
            padding=(kernel_size - 1) // 2,
            output_padding=kernel_size % 2,
            bias=bias,
        )

    def reset_parameters(self) -> None:
        """Draws a new weight, and sets the bias to zero."""
        # The weight is (in, out, k, k); with a 2 x 2 kernel a pixel's fan in is `in_channels`.
        fill(self.weight, self.draw, self.in_channels)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output (B, out, 2H, 2W) of a map (B, in, H, W), in the weight's data type."""
        return super().forward(x.to(self.weight.dtype))


class ChannelNorm(LayerNorm):
    """LayerNorm over the channels at each position of a map (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normed map, with the shape and data type of the input (B, C, H, W)."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormedConvolution(nn.Module):
    """A convolution without bias, a norm, and an optional ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Side of the kernel.
        relu: Whether a ReLU follows the norm.
        norm: Constructor of the norm, from the number of channels; by default `ChannelNorm`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        relu: bool,
        norm: Callable[[int], nn.Module] = lambda channels: ChannelNorm(channels, NORM_EPS),
    ):
        super().__init__()
        draw = he_normal(out_channels, kernel_size) if relu else he_uniform()
        self.convolution = Convolution(
            in_channels, out_channels, kernel_size, draw=draw, bias=False
        )
        self.norm = norm(out_channels)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output (B, out, H, W) for a map (B, in, H, W)."""
        x = self.norm(self.convolution(x))
        return F.relu(x) if self.relu else x

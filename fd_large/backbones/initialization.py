"""Schemes of initial weights, and a function that fills a parameter with random values.

Every module fills its own parameters in its own constructor. Under `deepspeed.zero.Init` a child is
partitioned as soon as its constructor returns, so that later writes by its parent would be lost.

Values are drawn from torch's global CPU generator in float32, whatever the device and dtype of the
parameter, so that a model built under `zero.Init` or on a GPU gets the same weights as on the CPU
after the same `torch.manual_seed`. Heads contain torch's and timm's own layers, which draw on their
own device; `HostDraws` makes these layers draw on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fd_large.errors import ConfigError, nearest

Initialization = Literal["fd", "official", "none"]


@dataclass(frozen=True)
class Draw:
    """A distribution of initial values.

    Attributes:
        kind: "normal"; "fan_in_uniform", which is uniform within +-1/sqrt(fan in), torch's default;
            or "constant".
        std: Standard deviation of the normal distribution, before truncation.
        cut: Largest absolute value of the normal distribution, which is truncated there.
        divide: Divisor of the drawn values, and of the constant.
        value: Value of the constant.
    """

    kind: Literal["normal", "fan_in_uniform", "constant"]
    std: float = 0.02
    cut: float = math.inf
    divide: float = 1.0
    value: float = 0.0

    def divided(self, by: float) -> Draw:
        """Returns the same distribution with all values divided by `by`."""
        return replace(self, divide=self.divide * by)


ZEROS = Draw("constant")
NORMAL = Draw("normal")
FAN_IN_UNIFORM = Draw("fan_in_uniform")
# The published code writes +-.02 where it means +-1: the cut falls at one standard deviation.
CUT_AT_ONE_SIGMA = Draw("normal", cut=0.02)


@dataclass(frozen=True)
class Scheme:
    """The distributions of a model's initial weights.

    Attributes:
        linear: Distribution of the weights of linear layers, whose biases are 0.
        convolution: Distribution of the weight of the patch embedding.
        convolution_bias: Distribution of the bias of the patch embedding.
        token: Distribution of prefix tokens and absolute positions.
        table: Distribution of relative position tables.
        rescale: Whether the last weight of each residual branch shrinks with depth.
        post_norm_weight: Initial weight of the norms that end residual branches (SwinV2).
    """

    linear: Draw
    convolution: Draw
    convolution_bias: Draw
    token: Draw
    table: Draw
    rescale: bool
    post_norm_weight: float

    def branch_end(self, divide_squared: float) -> Draw:
        """Returns the distribution of the last weight of a residual branch.

        If `rescale`, it is `linear` with values divided by the square root of `divide_squared`;
        else `linear`.
        """
        return self.linear.divided(math.sqrt(divide_squared)) if self.rescale else self.linear


# The scheme of Swin-Transformer; each family says how it uses or changes this scheme.
OFFICIAL = Scheme(NORMAL, FAN_IN_UNIFORM, FAN_IN_UNIFORM, NORMAL, NORMAL, False, 0.0)
# Zeros: for models whose weights are loaded right away, without the time to draw them.
NONE = Scheme(ZEROS, ZEROS, ZEROS, ZEROS, ZEROS, False, 0.0)


def scheme(schemes: Mapping[str, Scheme], name: str) -> Scheme:
    """Returns the scheme `name` of `schemes`, a family's {name: scheme}.

    Raises: ConfigError: if the family has no scheme of that name.
    """
    if name not in schemes:
        raise ConfigError(
            f"initialization: unknown scheme; got {name!r}, {nearest(name, schemes)}. Use one of "
            "these."
        )
    return schemes[name]


@torch.no_grad()
def fill(parameter: Tensor, draw: Draw, fan_in: int | None = None) -> None:
    """Overwrites a parameter with newly drawn values; does nothing on the meta device.

    Args:
        parameter: Tensor of any shape, float dtype and device.
        draw: Distribution of the values.
        fan_in: Number of inputs of the layer, for "fan_in_uniform". None: `parameter` is a weight
            (out, ...), and its number of elements per output is used.
    """
    if parameter.is_meta:
        return
    if draw.kind == "constant":
        parameter.fill_(draw.value / draw.divide)
        return
    in_place = parameter.device.type == "cpu" and parameter.dtype == torch.float32
    # From numpy, because zero.Init patches torch's own factories to its dtype and device.
    values = (
        parameter if in_place else torch.from_numpy(np.empty(tuple(parameter.shape), np.float32))
    )
    if draw.kind == "fan_in_uniform":
        bound = 1 / math.sqrt(fan_in or parameter[0].numel())
        values.uniform_(-bound, bound)
    elif math.isinf(draw.cut):
        values.normal_(0.0, draw.std)
    else:
        # Inverse of the normal's distribution function between the cuts.
        edge = math.erf(draw.cut / draw.std / math.sqrt(2))
        values.uniform_(-edge, edge).erfinv_().mul_(draw.std * math.sqrt(2))
        values.clamp_(-draw.cut, draw.cut)
    if draw.divide != 1:
        values.div_(draw.divide)
    if not in_place:
        parameter.copy_(values)


class HostDraws(TorchDispatchMode):
    """Context in which torch draws all random numbers with the CPU generator, for any device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation `func`, and returns its result on the device that the call asks for.

        An operation that draws random numbers runs on the CPU, and its result is copied.
        """
        kwargs = kwargs or {}
        requested_device = (
            args[0].device if args and isinstance(args[0], Tensor) else kwargs.get("device")
        )
        device = torch.device(requested_device or "cpu")
        if torch.Tag.nondeterministic_seeded not in func.tags or device.type in ("cpu", "meta"):
            return func(*args, **kwargs)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        drawn = func(*tree_map_only(Tensor, Tensor.cpu, args), **kwargs)
        return args[0].copy_(drawn) if func._schema.is_mutable else drawn.to(device)

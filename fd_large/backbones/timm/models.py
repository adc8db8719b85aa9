"""Models of timm by name: whole, and cut off after the map at a stride."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, NamedTuple

import timm
import torch
from packaging.version import Version
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from torch import nn

from fd_large.errors import ConfigError, VersionError, nearest

OLDEST = "1.0.31"
"""The only release that was seen not to run code that a model's configuration names."""


def create(name: str, **arguments: Any) -> nn.Module:
    """Builds a model of timm by name, whole, without asking any server.

    Args:
        name: timm's name of the model.
        arguments: What differs from timm's own arguments of that model.

    Raises:
        ConfigError: If timm has no such model, or does not return its inner maps.
        VersionError: If timm is too old.
    """
    if Version(timm.__version__) < Version(OLDEST):
        raise VersionError(
            f"timm: too old a release, which may run code from a model's configuration; got "
            f"{timm.__version__}, expected {OLDEST} or later. pip install 'timm>={OLDEST}'."
        )
    if not timm.is_model(name):
        raise ConfigError(
            f"student.model or teacher.model: no such model in timm {timm.__version__}; got "
            f"{name!r}, {nearest(name, timm.list_models())}. Use a name of timm.list_models()."
        )
    net = timm.create_model(name, pretrained=False, **arguments)
    if not hasattr(net, "forward_intermediates") or not hasattr(net, "prune_intermediate_layers"):
        raise ConfigError(
            f"architecture.timm_name: timm {timm.__version__} does not return inner maps of this "
            f"model; got {name!r}, expected one with forward_intermediates. Choose another model."
        )
    return net


@lru_cache(maxsize=64)
def size_arguments(name: str, image_size: int) -> dict[str, Any]:
    """Returns the arguments that make a model for images of that side in pixels.

    Models that take any size need none; 0 is the size that timm has the model for.
    """
    if not image_size:
        return {}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        net = create(name)
        config = net.pretrained_cfg
        if config["input_size"][-1] == image_size:
            return {}
        if hasattr(net, "set_input_size"):
            return {"img_size": image_size}
        if config.get("fixed_input_size"):
            try:
                create(name, img_size=image_size)
            except TypeError:
                return {}  # Of one size only, which `TimmBackbone.grid` says.
            return {"img_size": image_size}
    return {}


@cache
def can_resize(name: str) -> bool:
    """Whether timm carries the weights of a model over to another image size."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return hasattr(create(name), "set_input_size")


class Stage(NamedTuple):
    """The map of a model that is taken.

    Attributes:
        index: Number of the map among those that the model has.
        width: Channels.
        stride: Pixels per token, each way.
        is_last: Whether it is the model's last map, after its final norm.
    """

    index: int
    width: int
    stride: int
    is_last: bool


def cut(net: Any, name: str, stride: int) -> Stage:
    """Removes what a model computes after its deepest map of a stride; 0 is its last map.

    Raises: ConfigError: if it has no map of that stride.
    """
    stages = [(stage["reduction"], stage["num_chs"]) for stage in net.feature_info]
    known = sorted({reduction for reduction, _ in stages})
    stride = stride or known[-1]
    fitting = [i for i, (reduction, _) in enumerate(stages) if reduction == stride]
    if not fitting:
        raise ConfigError(
            f"architecture.feature_stride: {name} has no map of this stride; got {stride}, "
            f"expected one of {', '.join(map(str, known))}. Choose one of these."
        )
    index = fitting[-1]
    # Hiera's norms are its heads': its map is raw, and timm refuses to be asked.
    is_last = index == len(stages) - 1 and not isinstance(net, Hiera | HieraDet)
    net.prune_intermediate_layers([index], prune_norm=not is_last, prune_head=True)
    return Stage(index, stages[index][1], stride, is_last)

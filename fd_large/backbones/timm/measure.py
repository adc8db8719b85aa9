"""Measures on the meta device how a timm model can be trained.

A forward and a backward show in which order drop paths are called, which modules are the blocks,
and whether other modules draw random numbers. Models differ in these facts, and timm does not state
them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from timm.models import group_parameters
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fd_large.backbones.random_draws import Draws
from fd_large.backbones.timm.models import create, cut, map_of, sized
from fd_large.errors import ConfigError, first_line

_BATCH_SIZE = 2
# A rate at which the blocks are found of a model that is trained without drop path.
_ANY_RATE = 0.1


class Measured(NamedTuple):
    """The measured facts of a timm model that are needed to train it.

    Attributes:
        arguments: Arguments of `timm.create_model` that make the model.
        sites: (path, drop rate) of the drop-path module of each call in a forward, in order.
        owners: {path of a drop-path module: path of the block that gets its factors}.
        blocks: Paths of the modules whose activations can be recomputed, in order.
        layers: {name of a parameter: number of its layer, from 0}; empty if timm does not define
            layers of the model.
        last_layer: Number of the last layer, which is the layer of the head.
        fewest_places: Number of positions of the smallest map that a batch norm normalises; 0
            without batch norms.
    """

    arguments: Mapping[str, Any]
    sites: tuple[tuple[str, float], ...]
    owners: Mapping[str, str]
    blocks: tuple[str, ...]
    layers: Mapping[str, int]
    last_layer: int
    fewest_places: int


@lru_cache(maxsize=64)
def measure(name: str, stride: int, image_size: int, drop_path_rate: float) -> Measured:
    """Measures a model: builds it on the meta device, and runs it forward and backward once.

    Args:
        name: timm's name of the model.
        stride: Pixels per token of the model's map; 0 means its last map.
        image_size: Side of the images in pixels; 0 means the model's default size in timm.
        drop_path_rate: Drop rate of the last block, in [0, 1).

    Raises: ConfigError: if training the model would depend on ranks or on recomputation.
    """
    arguments = dict(sized(name, image_size).arguments)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        try:
            whole: Any = create(name, **arguments, drop_path_rate=drop_path_rate or _ANY_RATE)
            arguments["drop_path_rate"] = drop_path_rate
        except TypeError as error:
            if "drop_path_rate" not in str(error):
                raise
            whole = create(name, **arguments)
        layers, has_head = _layers(whole)
        drops = _run(whole, name, stride, image_size)
    kinds = {type(module) for path, module in whole.named_modules() if path in drops.owner.values()}
    return Measured(
        arguments,
        drops.order if drop_path_rate else (),
        drops.owner if drop_path_rate else {},
        tuple(
            path
            for path, module in whole.named_modules()
            if type(module) in kinds and path not in drops.growing
        ),
        layers,
        _last_layer(layers, whole, has_head=has_head),
        drops.fewest_places,
    )


class _Seen(NamedTuple):
    """The facts that one forward and backward on the meta device show.

    Attributes:
        order: (path, drop rate) of the drop-path module of each call in a forward, in order.
        owner: {path of a drop-path module: path of the block that gets its factors}.
        growing: Paths of modules that take a list as an argument. These modules cannot be
            recomputed in backward, since the list may have grown by then.
        fewest_places: Number of positions of the smallest map that a batch norm normalises; 0
            without batch norms.
    """

    order: tuple[tuple[str, float], ...]
    owner: dict[str, str]
    growing: set[str]
    fewest_places: int


def _run(net: Any, name: str, stride: int, image_size: int) -> _Seen:
    """Cuts a model on the meta device after the map of a stride, and runs it once.

    Args: As for `models.cut`.

    Raises:
        ConfigError: If the model does not accept the images, or training it would depend on ranks
            or on recomputation.
    """
    stage = cut(net, name, stride, image_size)
    still(net)
    side = image_size or sized(name, 0).side
    if stage.last is None and not image_size:
        # A few models' own size does not divide into tokens.
        side = -(-side // stage.stride) * stage.stride
    grid = stage.grid(side, side)
    if grid is None:
        raise ConfigError(
            f"student.model: images do not divide into the tokens of {name}; got {side}x{side} "
            f"pixels, expected a multiple of {stage.stride}. Set --data.image_size."
        )
    modules = dict(net.named_modules())
    rates = {
        path: module.drop_prob for path, module in modules.items() if isinstance(module, DropPath)
    }
    order: list[str] = []
    runs: Counter[str] = Counter()
    batches: dict[str, int] = {}
    growing: set[str] = set()
    places: list[int] = []

    def called(path: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        order.append(path)
        batches[path] = len(inputs[0])

    def ran(path: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        runs[path] += 1
        if any(isinstance(value, list) for value in inputs):
            growing.add(path)

    def normalises(path: str, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        (x,) = inputs
        if len(x) % _BATCH_SIZE:
            raise _refused(name, f"batch norm {path} of {len(x)} rows for {_BATCH_SIZE} images")
        places.append(x.numel() // (_BATCH_SIZE * x.shape[1]))

    for path, module in modules.items():
        if path in rates:
            module.drop_prob = 0.0  # timm's own module then draws nothing.
            module.register_forward_pre_hook(partial(called, path))
        else:
            module.register_forward_pre_hook(partial(ran, path))
        if isinstance(module, _BatchNorm):
            module.register_forward_pre_hook(partial(normalises, path))
    images = torch.empty(_BATCH_SIZE, 3, side, side, device="meta")
    try:
        with Draws() as draws:
            tokens = map_of(net.train(), stage, images)
            tokens.sum().backward()
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"student.model: {name} does not accept images of this size; got {side}x{side} pixels "
            f"({first_line(error)}), expected a size that it accepts. Set"
            " --data.image_size."
        ) from error
    if draws.seen:
        raise _refused(name, f"random draws besides drop path ({', '.join(sorted(draws.seen))})")
    if idle := [path for path, p in net.named_parameters() if p.grad is None]:
        # Weight decay would shrink unused parameters all the same.
        raise ConfigError(
            f"student.model: the map of {name} does not depend on all of its parameters; got "
            f"{len(idle)} unused parameters ({idle[0]}, ...), expected none. Choose another model."
        )
    if tokens.shape[1] != grid[0] * grid[1]:
        raise ConfigError(
            f"student.model: the map of {name} has another stride than in timm's description; got "
            f"{tokens.shape[1]} tokens of {side}x{side} pixels, expected {grid[0]}x{grid[1]}. Use "
            "another model."
        )
    owner = {}
    for path in dict.fromkeys(order):
        above = path.rpartition(".")[0]
        while above and not runs[above]:
            above = above.rpartition(".")[0]
        if runs[above] != 1:
            block = above or "no block"
            raise _refused(name, f"drop path {path} in {block}, run {runs[above]} times")
        if batches[path] % _BATCH_SIZE:
            raise _refused(name, f"drop path of {batches[path]} rows for {_BATCH_SIZE} images")
        owner[path] = above
    sites = tuple((path, rates[path]) for path in order)
    return _Seen(sites, owner, growing, min(places, default=0))


def still(net: nn.Module) -> None:
    """Sets all dropout rates of `net` to 0.

    A few timm models have dropout by default, in the MLPs of their positions.
    """
    for module in net.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0


def _layers(net: Any) -> tuple[dict[str, int], bool]:
    """Returns {parameter name: number of its layer}, and whether the classifier has parameters.

    Layers are numbered as by timm's `param_groups_layer_decay`. If timm does not define layers of
    the model, the result is ({}, False).

    Args:
        net: The whole timm model.
    """
    if not hasattr(net, "group_matcher"):
        return {}, False
    layers = group_parameters(net, net.group_matcher(coarse=False), reverse=True)
    head = net.get_classifier() if hasattr(net, "get_classifier") else None
    return layers, isinstance(head, nn.Module) and any(True for _ in head.parameters())


def _last_layer(layers: Mapping[str, int], net: nn.Module, *, has_head: bool) -> int:
    """Returns the number of the layer of the head, or 0 if `layers` is empty.

    It is the number of timm's last layer, with one exception: if the model has no head, and `net`
    has parameters in the last layer, it is the next number. The learning rate of the last block
    then decays as in a model with a head.

    Args:
        layers: {parameter name: number of its layer}; empty if timm does not define layers.
        net: The model without the modules that the map does not need.
        has_head: Whether the classifier of the whole model has parameters.
    """
    if not layers:
        return 0
    last = max(layers.values())
    ends_there = any(layers[name] == last for name, _ in net.named_parameters())
    return last + (ends_there and not has_head)


def _refused(name: str, got: str) -> ConfigError:
    return ConfigError(
        f"student.model: training {name} would depend on ranks and recomputation; got {got}, "
        "expected none of these. Use the model as a teacher, or choose another model."
    )

"""Builds the user's own model, as a student or a teacher, by the user's code.

`NAME` of `module:PATH/TO/FILE.py:NAME` is a class or a function that returns a torch Module with

    forward(images, keep) -> FeatureMap   maps normalised images (B, 3, H, W); `keep` is None or has
                                          a row of B bools for each entry of drop_path_rates
    width, num_prefix_tokens              channels of the map, and its tokens before the patches
    grid(height, width)                   rows and columns of the map of an image
    drop_path_rates                       the rate of each row of `keep`
    blocks()                              the modules whose activations may be recomputed, in order

A teacher needs neither `drop_path_rates` nor `blocks()`, and brings its weights; its `forward` is
called with the images alone. These attributes are optional:

    statistics                            mean and standard deviation by which images are normalised
    layer_id(name), last_layer            number of a parameter's layer, and the highest number,
                                          for `optim.layer_decay`
    no_weight_decay()                     names of parameters that get no weight decay
    fewest_places                         number of positions of the smallest map that a batch norm
                                          normalises; needed only if that is not the last map
    stages(images, keep)                  for detection, four maps (B, H, W, C) of images of any
                                          size, with `stage_widths` and `stage_strides`

The class or function is called with whichever of `image_size` and `drop_path_rate` it accepts, more
than once, also under `torch.device("meta")`, where weights are only shapes.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from fd_large import doors
from fd_large.backbones import batch_norm
from fd_large.backbones.custom.architecture import CustomArchitecture
from fd_large.backbones.family import Options
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.random_draws import Draws, refuse_chance
from fd_large.errors import ConfigError

_NEEDED = ("forward", "width", "num_prefix_tokens", "grid")
_NEEDED_TO_TRAIN = ("drop_path_rates", "blocks")


def build_custom(
    architecture: CustomArchitecture, options: Options, *, where: str = "student.model"
) -> nn.Module:
    """Imports the user's code and makes the model.

    Args:
        architecture: Names the class or function that makes the model.
        options: Options of the model, of which the user's code gets the drop path rate alone.
        where: Field that the user set, for messages.

    Raises:
        ConfigError: If the class or function does not exist, fails, or returns a model that lacks
            attributes, all of which are named.
    """
    make = doors.load(architecture.code, kind="backbones", where=where)
    offered = {"drop_path_rate": options.drop_path_rate, "image_size": architecture.image_size}
    try:
        taken = inspect.signature(make).parameters
        net = make(**{name: value for name, value in offered.items() if value and name in taken})
    except Exception as error:  # The user's code may raise anything.
        raise ConfigError(
            f"{where}: the model cannot be made; got {doors.cause(error)}, expected a torch Module "
            f"from {architecture.function}. Correct the code; the function is called on the meta "
            "device too, where tensors have no values."
        ) from error
    needed = _NEEDED + (_NEEDED_TO_TRAIN if options.is_trained else ())
    lacks = [name for name in needed if not hasattr(net, name)]
    if not isinstance(net, nn.Module) or lacks:
        raise ConfigError(
            f"{where}: not a backbone; got {type(net).__name__} from {architecture.function} "
            f"without {', '.join(lacks) or 'parameters'}, expected a torch Module with "
            f"{', '.join(needed)}. docs/extending.md says what each is."
        )
    if options.is_trained:
        refuse_chance(net, architecture.function, where=where, has_groups=True)
        _group_norms(net, architecture.image_size, where)
    _complete(net)
    return net


def _group_norms(net: Any, image_size: int, where: str) -> None:
    """Makes a model's batch norms, torch's or timm's, normalise by groups of images.

    If the model has such norms but no attribute `fewest_places`, and `image_size` is known, the
    attribute becomes the number of positions of the model's map.

    Args:
        net: The model.
        image_size: Side of the images in pixels; 0 if unknown.
        where: Field that the user set, for messages.

    Raises: ConfigError: if `grid` of the model fails.
    """
    groups = batch_norm.adopt(net)
    if not batch_norm.norms_of(net):
        return

    def count_images(net: nn.Module, arguments: tuple[Any, ...]) -> None:
        # The model may flatten the images with other dimensions before a norm.
        groups.images = len(arguments[0])

    net.register_forward_pre_hook(count_images)
    if stages := getattr(net, "stages", None):

        def stages_of_groups(images: Tensor, *arguments: Any, **named: Any) -> Any:
            groups.images = len(images)
            return stages(images, *arguments, **named)

        net.stages = stages_of_groups
    if hasattr(net, "fewest_places") or not image_size:
        return
    try:
        net.fewest_places = math.prod(net.grid(image_size, image_size))
    except Exception as error:  # The user's code may raise anything.
        raise ConfigError(
            f"{where}: grid({image_size}, {image_size}) fails; got {doors.cause(error)}, expected "
            "rows and columns of the map. Correct the code."
        ) from error


def _complete(net: Any) -> None:
    """Sets default values for the optional attributes of a backbone that the model `net` lacks.

    By default there are no drop path rates, no parameters without weight decay, and no layers.
    """
    for name, value in (
        ("drop_path_rates", ()),
        ("no_weight_decay", frozenset),
        ("no_weight_decay_keywords", tuple),
        ("layer_id", _no_layers),
        ("last_layer", 0),
    ):
        if not hasattr(net, name):
            setattr(net, name, value)


def _no_layers(name: str) -> int:
    raise ConfigError(
        "optim.layer_decay: the student has no layer_id; got a value other than 1, expected 1."
        " Set --optim.layer_decay 1, or give "
        "the model layer_id and last_layer."
    )


def check_map(net: Any, image_size: int, *, is_trained: bool, where: str) -> None:
    """Runs a model on the meta device once, and checks the feature map that it returns.

    A forward that fails because meta tensors have no values is accepted.

    Args:
        net: Result of `build_custom` on the meta device.
        image_size: Side of the images, in pixels.
        is_trained: Whether the model is a student, which is called with `keep`.
        where: Field that the user set, for messages.

    Raises:
        ConfigError: If the model fails, returns no FeatureMap of the stated shape, or draws random
            numbers.
    """
    images = torch.empty(2, 3, image_size, image_size, device="meta")
    sites = len(net.drop_path_rates)
    keep = torch.ones(sites, 2, dtype=torch.bool, device="meta") if sites else None
    expected = ""
    try:
        with Draws() as draws, torch.no_grad():
            result = net(images, keep) if is_trained else net(images)
        rows, columns = net.grid(image_size, image_size)
        shape = (2, net.num_prefix_tokens + rows * columns, net.width)
        expected = f" with tokens {shape}, grid {(rows, columns)}"
        if not isinstance(result, FeatureMap):
            got = type(result).__name__
        elif (tuple(result.tokens.shape), tuple(result.grid)) != (shape, (rows, columns)):
            got = f"tokens {tuple(result.tokens.shape)}, grid {tuple(result.grid)}"
        elif result.num_prefix_tokens != net.num_prefix_tokens:
            got = f"num_prefix_tokens {result.num_prefix_tokens}, not {net.num_prefix_tokens}"
        elif draws.seen:
            got = f"random draws ({', '.join(sorted(draws.seen))})"
        else:
            return
    except Exception as error:  # The user's code may raise anything.
        if "meta" in str(error).lower():
            return
        got = doors.cause(error)
    raise ConfigError(
        f"{where}: forward does not return a feature map of images {tuple(images.shape)}; got "
        f"{got}, expected a FeatureMap{expected}, and no random draws besides `keep`. "
        "docs/extending.md has an example."
    )

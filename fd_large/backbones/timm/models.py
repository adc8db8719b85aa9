"""Builds timm models by name, whole or cut after the map at a stride."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from functools import cache, lru_cache
from math import isqrt
from typing import Any, NamedTuple

import timm
import torch
from einops import rearrange
from packaging.version import Version
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fd_large.backbones.timm.architecture import split_arguments
from fd_large.errors import ConfigError, ShapeError, VersionError, first_line

OLDEST = "1.0.31"
"""The only release that was seen not to run code that a model's configuration names."""

_WHERE = "model"  # A section of a recipe, or what a command was given.


def create(name: str, **arguments: Any) -> nn.Module:
    """Builds a whole timm model with random weights, without network access.

    Args:
        name: timm's name of the model, after which arguments may follow as JSON
            (`TimmArchitecture.timm_name`).
        arguments: Further arguments of `timm.create_model`, which override those in `name`.

    Raises:
        ConfigError: If timm lacks the model, refuses the arguments after its name, or cannot return
            the maps of the model's stages.
        VersionError: If timm is too old.
    """
    check_name(name)
    timm_name, named = split_arguments(name)
    on_meta = torch.get_default_device().type == "meta"
    try:
        with _ShapesOnly() if on_meta else nullcontext():
            net = timm.create_model(timm_name, pretrained=False, **{**named, **arguments})
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        if not named or arguments:
            raise
        raise ConfigError(
            f"{_WHERE}: timm cannot make this model; got {first_line(error)} for {name[:300]}, "
            f"expected arguments of {timm_name}. Leave these arguments out."
        ) from error
    if not hasattr(net, "forward_intermediates") or not hasattr(net, "prune_intermediate_layers"):
        raise ConfigError(
            f"architecture.timm_name: timm {timm.__version__} does not return inner maps of this "
            f"model; got {name!r}, expected a model with forward_intermediates. Choose another "
            "model."
        )
    return net


class _ShapesOnly(TorchFunctionMode):
    """Context that skips filling tensors on the meta device, which would take most of the time."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FILLING:
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        return func(*args, **kwargs)


_FILLING = {
    *(nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_),
    *(Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, Tensor.fill_, Tensor.zero_),
    *(Tensor.mul_, Tensor.add_, Tensor.clamp_),
}


def check_name(name: str) -> None:
    """Checks that the installed release of timm has the model `name` and is not too old.

    Raises: ConfigError: if timm lacks the model; VersionError: if timm is too old.
    """
    if Version(timm.__version__) < Version(OLDEST):
        raise VersionError(
            f"timm: a release that is too old, and may run code from a model's configuration; got "
            f"{timm.__version__}, expected {OLDEST} or later. Run pip install 'timm>={OLDEST}'."
        )
    name = split_arguments(name)[0]
    if not timm.is_model(name):
        raise ConfigError(
            f"{_WHERE}: no such model in timm {timm.__version__}; got {name!r}, "
            f"{near_names(name)}. Use a name of timm.list_models()."
        )


def near_names(name: str) -> str:
    """Returns text for a message that lists the names of timm's models nearest to `name`.

    If no name is near, the text says that a name of timm is expected.
    """
    near = get_close_matches(name.partition(".")[0], timm.list_models(), n=5, cutoff=0.3)
    return f"nearest: {', '.join(near)}" if near else "expected a name that timm knows"


def config_of(name: str) -> Any:
    """Returns timm's `pretrained_cfg` of the model `name`.

    The result is None if timm has none, as for a user's own model.
    """
    return timm.get_pretrained_cfg(split_arguments(name)[0])


class Size(NamedTuple):
    """The image size of a model.

    Attributes:
        side: Side of the images in pixels.
        arguments: Arguments of `create` that make the model for this size.
        is_only: Whether the model takes no other size.
    """

    side: int
    arguments: Mapping[str, Any]
    is_only: bool


@lru_cache(maxsize=256)
def sized(name: str, image_size: int) -> Size:
    """Returns the image size of a model that is made for images of `image_size` pixels a side.

    The result is the model's default size if `image_size` is 0, or if the model cannot be made for
    another size.

    Args:
        name: timm's name of the model.
        image_size: Side of the images in pixels, or 0.
    """
    check_name(name)
    config = config_of(name)
    if config is None:  # A model of the user's own, registered with timm.
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            config = timm.models.PretrainedCfg(**create(name).pretrained_cfg)
    side, is_fixed = config.input_size[-1], bool(config.fixed_input_size)
    if image_size in (0, side):
        return Size(side, {}, is_fixed)
    if not is_fixed and not can_resize(name):
        return Size(image_size, {}, False)
    if not can_resize(name):
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                create(name, img_size=image_size)
        except TypeError:
            return Size(side, {}, True)
    return Size(image_size, {"img_size": image_size}, is_fixed)


def size_arguments(name: str, image_size: int) -> Mapping[str, Any]:
    """Returns the arguments of `create` that make the model `name` for `image_size` pixels a side.

    The result is empty if the model needs no argument for this size, or if `image_size` is 0.
    """
    return sized(name, image_size).arguments


@cache
def can_resize(name: str) -> bool:
    """Whether timm can convert the weights of the model `name` to another image size."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return hasattr(create(name), "set_input_size")


@cache
def strides(name: str) -> list[int]:
    """Returns the strides at which timm's model `name` has maps, in rising order.

    Raises: ConfigError: if timm lacks the model.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return sorted({stage["reduction"] for stage in create(name).feature_info})


class Layout(NamedTuple):
    """The layout of the map in the tensor that `forward_features` returns.

    Attributes:
        grid: Rows and columns of the map.
        width: Channels of the map.
        stride: Pixels per token, each way.
        is_regular: Whether `stride` is the stride that timm states for the model's last stage. If
            so, `stride` also gives the grid for images of other sizes.
        num_prefix_tokens: Number of tokens before the tokens of the map.
        is_channels_last: Whether a map with rows and columns as separate axes has channels last.
    """

    grid: tuple[int, int]
    width: int
    stride: int
    is_regular: bool
    num_prefix_tokens: int
    is_channels_last: bool


class LastMap(NamedTuple):
    """The last map of a model, found by running `forward_features` on the meta device.

    Attributes:
        side: Side of the image in pixels.
        layout: Layout of the map in the result of `forward_features`.
        unused: Paths of the modules that the map does not need.
    """

    side: int
    layout: Layout
    unused: tuple[str, ...]


@lru_cache(maxsize=256)
def last_map(name: str, image_size: int) -> LastMap:
    """Finds the last map by running `forward_features` of a model on the meta device.

    Args:
        name: timm's name of the model.
        image_size: Side of the images in pixels; 0 means the model's default size in timm.

    Raises:
        ShapeError: If the model does not accept the size.
        ConfigError: If the model returns no map.
    """
    side, arguments, _ = sized(name, image_size)
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        net: Any = create(name, **arguments).eval()
        images = torch.empty(2, 3, side, side)
        output, unused = _watched(net, lambda: net.forward_features(images), name, side)
    return LastMap(side, layout_of(net, name, side, output), unused)


def layout_of(net: Any, name: str, side: int, output: Any) -> Layout:
    """Returns the layout of the map in the result of `forward_features`.

    Args:
        net: A whole timm model.
        name: The model's name in timm.
        side: Side of the images in pixels.
        output: Result of `forward_features`.

    Raises: ConfigError: if the result is not a map of tokens.
    """
    if not isinstance(output, Tensor) or output.dim() not in (3, 4):
        raise _no_map(name, _shape_text(output))
    stated = net.feature_info[-1]["reduction"]
    prefix, is_channels_last = 0, False
    if output.dim() == 3:
        length, width = output.shape[1:]
        prefix = getattr(net, "num_prefix_tokens", None)
        if prefix is None:  # Not every model says how many tokens come before those of its map.
            prefix = 0 if isqrt(length) ** 2 == length else length - (side // stated) ** 2
        rows = cols = isqrt(max(length - max(prefix, 0), 0))
        if rows * cols != length - prefix or rows <= min(1, side // stated - 1):
            raise _no_map(name, f"{length} tokens of {side}x{side} pixels")
    else:
        # Channels are told from rows and columns by timm's own number of them.
        is_channels_last = output.shape[1] != net.num_features
        shape = output.permute(0, 3, 1, 2).shape if is_channels_last else output.shape
        _, width, rows, cols = shape
    # Some convolutions round up; some models pool or resize their last map.
    is_regular = rows in (side // stated, -(-side // stated))
    stride = stated if is_regular else side // rows
    # Or leave out what is less than a patch, as SigLIP's at 384 pixels does.
    fits = is_regular or stride * rows in range(side, side + stride)
    if rows != cols or not fits:
        raise _no_map(name, f"{rows}x{cols} tokens of {side}x{side} pixels")
    return Layout((rows, cols), width, stride, is_regular, prefix, is_channels_last)


def _watched(
    net: nn.Module, run: Callable[[], Any], name: str, side: int
) -> tuple[Any, tuple[str, ...]]:
    """Runs a model, and finds the modules whose parameters the run does not use.

    Args:
        net: The model.
        run: Runs the model and returns the result.
        name: timm's name of the model, for the message.
        side: Side of the images in pixels, for the message.

    Returns: the result, and the paths of the unused modules.
    Raises: ShapeError: if the model does not accept the images.
    """
    try:
        with torch.no_grad(), _Used() as used:
            output = run()
    except (AssertionError, RuntimeError, ValueError, TypeError) as error:
        raise ShapeError(
            f"{_WHERE}: {name} does not accept images of this size; got {side}x{side} pixels "
            f"({first_line(error)}), expected a size that it accepts. Set --data.image_size, or "
            "for a teacher --teacher.architecture.image_size."
        ) from error
    unused: list[str] = []
    for path, module in net.named_modules(remove_duplicate=False):
        if not path or any(path.startswith(f"{gone}.") for gone in unused):
            continue
        parameters = [*module.parameters()]
        if parameters and not any(id(t) in used.seen for t in (*parameters, *module.buffers())):
            unused.append(path)
    return output, tuple(unused)


class _Used(TorchFunctionMode):
    """Context that records which tensors are arguments of torch's functions.

    Attributes:
        seen: Python ids of the tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # A call that returns no tensor, such as a dtype or a device, uses no values.
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            leaves = tree_leaves((args, kwargs))
            self.seen.update(id(leaf) for leaf in leaves if isinstance(leaf, Tensor))
        return result


def _no_map(name: str, got: str) -> ConfigError:
    return ConfigError(
        f"{_WHERE}: forward_features of timm's {name} returns no map of tokens; got {got}, "
        "expected a token for each place of a grid. Choose another model, or one of its earlier "
        "maps by architecture.feature_stride."
    )


def _shape_text(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    if isinstance(output, list | tuple):
        return f"{len(output)} tensors"
    return type(output).__name__


class Stage(NamedTuple):
    """The map of a timm model that the backbone returns.

    Attributes:
        index: Index of the map among the model's maps.
        width: Channels of the map.
        stride: Pixels per token, each way.
        last: Layout of the map in the result of `forward_features`, if the map is the model's last;
            None for the map of an earlier stage.
    """

    index: int
    width: int
    stride: int
    last: LastMap | None

    def grid(self, height: int, width: int) -> tuple[int, int] | None:
        """Returns (rows, columns) of the map of an image of (height, width) pixels.

        The result is None if a side is not a multiple of the stride. A square image of the size for
        which the model is made always has a map, since some models round such a map up.
        """
        if self.last and height == width == self.last.side:
            return self.last.layout.grid  # Which some models round up.
        if height % self.stride or width % self.stride:
            return None
        return height // self.stride, width // self.stride


def cut(net: Any, name: str, stride: int, image_size: int) -> Stage:
    """Removes a model's modules after its deepest map of a stride, and returns that map.

    Args:
        net: The whole model, which is changed.
        name: timm's name of the model.
        stride: Pixels per token of the map; 0 means the last map.
        image_size: Side of the images in pixels; 0 means the model's default size in timm.

    Raises:
        ConfigError: If the model has no map of that stride.
        ShapeError: If the model does not accept the image size.
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
    if index < len(stages) - 1:
        net.prune_intermediate_layers([index], prune_norm=True, prune_head=True)
        return Stage(index, stages[index][1], stride, None)
    last = last_map(name, image_size)
    for path in last.unused:
        net.set_submodule(path, nn.Identity())
    return Stage(index, last.layout.width, last.layout.stride, last)


def map_of(net: Any, stage: Stage, images: Tensor) -> Tensor:
    """Returns the map (B, h * w, C) of `stage`, without prefix tokens, of images (B, 3, H, W).

    Args:
        net: The timm model, cut after the map.
        stage: The map that `cut` returned.
        images: (B, 3, H, W), normalised images.
    """
    if stage.last is None:
        (feature_map,) = inner_maps(net, [stage.index], images)
    else:
        feature_map = net.forward_features(images)
        if feature_map.dim() == 3:
            return feature_map[:, stage.last.layout.num_prefix_tokens :]
        if stage.last.layout.is_channels_last:
            return rearrange(feature_map, "b h w c -> b (h w) c")
    return rearrange(feature_map, "b c h w -> b (h w) c")


def class_token_and_map_of(net: Any, stage: Stage, images: Tensor) -> tuple[Tensor, Tensor]:
    """Returns (class token (B, 1, C), map (B, h * w, C)) of images.

    Args:
        net: A timm model whose first token is the class token.
        stage: The model's last map.
        images: (B, 3, H, W), normalised images.
    """
    assert stage.last is not None
    tokens = net.forward_features(images)
    return tokens[:, :1], tokens[:, stage.last.layout.num_prefix_tokens :]


def inner_maps(net: Any, indices: Sequence[int], images: Tensor) -> list[Tensor]:
    """Returns the maps (B, C, h, w) of some stages as raw activations, without a final norm.

    Args:
        net: The timm model.
        indices: Indices of the stages, in rising order.
        images: (B, 3, H, W), normalised images.
    """
    return net.forward_intermediates(
        images, indices=list(indices), norm=False, output_fmt="NCHW", intermediates_only=True
    )


@lru_cache(maxsize=64)
def unused_by_stages(name: str, stride: int, indices: tuple[int, ...]) -> tuple[str, ...]:
    """Returns the paths of modules in a cut model that the maps of some stages do not use.

    Args:
        name: timm's name of the model.
        stride: Pixels per token of the map after which the model is cut; 0 means the last map.
        indices: Indices of the stages.
    """
    side = sized(name, 0).side
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        net: Any = create(name).eval()
        cut(net, name, stride, 0)
        images = torch.empty(2, 3, side, side)
        return _watched(net, lambda: inner_maps(net, indices, images), name, side)[1]

"""Builds frozen models: Modules that map uint8 images to a feature map."""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fd_large import mapped_files
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.registry import build, is_module, statistics_of
from fd_large.backbones.resize import resize_images
from fd_large.backbones.statistics import Statistics, normalise
from fd_large.engine.student import attention_memory
from fd_large.engine.zero import partition
from fd_large.errors import ConfigError
from fd_large.ranks import distributed
from fd_large.recipes.architectures import by_name, resolve
from fd_large.recipes.sections import RANDOM, FrozenModel
from fd_large.weights.coverage import Fitted, covered
from fd_large.weights.resolve import Sources
from fd_large.weights.settle import stated_statistics


class Frozen(nn.Module):
    """A frozen backbone that maps uint8 images to a feature map.

    Args:
        net: The backbone: normalised images -> FeatureMap after its final norm.
        statistics: The normalisation that the backbone was trained with.
        image_size: Side in pixels to which the normalised images are resized (bilinear,
            antialiased) before the backbone; 0 leaves the images as they are.
        sides: {side of the given images: side to which they are resized}, in pixels. Images whose
            side is not a key are resized to `image_size`.
    """

    def __init__(
        self,
        net: nn.Module,
        statistics: Statistics,
        *,
        image_size: int = 0,
        sides: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.net = net
        self.statistics = statistics
        self.image_size, self.sides = image_size, dict(sides)
        self.requires_grad_(False)
        super().train(False)

    @property
    def width(self) -> int:
        """Number of channels of the map."""
        return self.net.width

    def grid(self, image_size: int) -> tuple[int, int]:
        """Returns (rows, columns) of the map for square images of side `image_size`, in pixels."""
        side = self.side(image_size)
        return self.net.grid(side, side)

    def side(self, image_size: int) -> int:
        """Returns the side, in pixels, to which images of side `image_size` are resized."""
        return self.sides.get(image_size, self.image_size) or image_size

    def train(self, mode: bool = True) -> Frozen:
        """Keeps the Module in evaluation mode, whatever `mode` is."""
        return super().train(False)

    def forward(self, images: Tensor) -> FeatureMap:
        """Returns the feature map of uint8 images (B, 3, H, W), without gradient.

        Source: official code, models/feature_distillation.py FD.forward, the target branch.
        """
        with torch.no_grad():
            pixels = normalise(images, self.statistics)
            side = self.side(pixels.shape[-1])
            if side != pixels.shape[-1]:
                pixels = resize_images(pixels, (side, side))
            # Under ZeRO-3 a parameter outside its module's forward is empty but keeps its dtype.
            return self.net(pixels.to(next(self.net.parameters()).dtype))


def frozen_maker(
    section: FrozenModel,
    *,
    image_size: int,
    own_image_size: int = 0,
    sides: Mapping[int, int] = MappingProxyType({}),
    residual_dtype: Literal["compute", "float32"] = "compute",
    before_norm: bool = False,
    **options: Any,
) -> Callable[[], Frozen]:
    """Returns a function that constructs a recipe's frozen model, with random weights.

    Args:
        section: The model's section of the recipe, with all fields set that its weights decide.
        image_size: Side of the images that the model will be given, in pixels.
        own_image_size: See `FrozenPart.image_size`.
        sides: See `Frozen`; for training with images of several sides.
        residual_dtype: See `backbones.family.Options`.
        before_norm: Whether the map is taken before the final norm instead of after it.
        options: Other fields of `backbones.family.Options`.

    Raises: ConfigError: if the model has no final norm that can be left out.
    """
    architecture = resolve(section.model, section.architecture)
    # Which norm is the last is known for models of this package's own families only.
    if before_norm and architecture.mean_norm == "also":
        raise ConfigError(
            "objective.layer: this model has no map before its final norm; got "
            f"before_norm for {section.model}, expected last. Leave out objective.layer, or "
            "choose a ViT or Swin model of this package."
        )
    side = own_image_size or architecture.fixed_image_size

    def make() -> Frozen:
        net = build(
            architecture,
            initialization="official",
            attention_memory=attention_memory("auto"),
            residual_dtype=residual_dtype,
            **options,
        )
        if before_norm:
            # The norm stays, with its weights, and its result is not used.
            net.norm.register_forward_hook(lambda _norm, inputs, _result: inputs[0])
        stated = stated_statistics(section) or getattr(net, "statistics", None)
        statistics = stated or statistics_of(section.model, architecture)
        own_side = 0 if side == image_size else side
        return Frozen(net, statistics, image_size=own_side, sides=sides)

    return make


def frozen_weights(section: FrozenModel, sources: Sources, *, where: str) -> Fitted | None:
    """Finds the weights of a recipe's frozen model; reads only headers of files.

    Args:
        section: See `frozen_maker`.
        sources: The sources that open the weights.
        where: For messages: the flag of the source, or the name by which the user named the model.

    Returns: The tensors of the model, complete as far as the headers show; None if the weights are
        random or the user's own Module brings them.

    Raises:
        ConfigError: If the section names no source.
        WeightsError: If the file does not fit.
    """
    source = section.source
    section.require_source(where)
    if source == RANDOM or is_module(source):
        return None
    flags = where.removesuffix(".source")
    remedy = (
        f"Set {flags}.model auto to take the model of the file, or {flags}.allow NAMES to do "
        "without these tensors."
    )
    if by_name(section.model) is None:  # The model's name was found from the file.
        remedy = (
            f"If it is a model of timm, set {flags}.model timm:NAME. {flags}.allow NAMES does "
            "without tensors that the map does not need."
        )
    if not where.startswith("--"):
        remedy = (
            "Name the model of the file, as timm:NAME=FILE, or the file alone if it shows "
            "its model."
        )
    return sources.resolve(source, where=where).fitted(
        resolve(section.model, section.architecture), allow=section.allow, remedy=remedy
    )


def built_from(
    weights: Fitted, make: Callable[[], Frozen], *, dtype: torch.dtype, where: str
) -> Frozen | None:
    """Builds an unsharded model on this rank's device without any memory beyond its weights.

    Parameters take no memory until the file's tensors replace them, one by one, in the requested
    type. On a CPU, tensors that the file has in this type stay mapped: pages of the file, which all
    processes of a host share and the system may drop and read again. A write to a tensor copies its
    page and leaves the file unchanged. `mapped_files.check` of the model tells whether the file has
    changed since.

    Args:
        weights: The tensors of the backbone, on every rank.
        make: Constructs the model with random weights.
        dtype: Data type of the model's parameters.
        where: The flag of the source, for messages.

    Returns: the model; None if the weights do not suffice to build the model, because the user
        allows some to be missing or because buffers are computed from parameters.
    Raises: WeightsError: if the weights do not fit, on all ranks.
    """
    if weights.may_be_missing:
        return None
    hook = nn.modules.module.register_module_parameter_registration_hook(_WithoutMemory())
    try:
        model = partition.build(make, {}, partitioned=False, seed=0)
    finally:
        hook.remove()
    if any(buffer.is_meta for buffer in model.buffers()):
        return None
    device, statistics = distributed.device(), partition.running_statistics(model.net)
    expected = {name: tuple(t.shape) for name, t in model.net.named_parameters()}
    expected |= {name: tuple(t.shape) for name, t in statistics.items()}
    # A tensor that several modules use has several names, and its weights the first of them.
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.net.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    names_of = {same[0]: same for same in names.values()}

    def fill(items: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in items:
            if name in statistics:
                statistics[name].copy_(tensor)
                continue
            parameter = nn.Parameter(tensor.to(device, dtype).contiguous(), requires_grad=False)
            for each in names_of[name]:
                module, _, last = each.rpartition(".")
                setattr(model.net.get_submodule(module), last, parameter)

    tensors = covered(expected, weights, where=where)
    if device.type == "cpu" and weights.is_file_of(dtype):
        distributed.together(lambda: fill(tensors))
        mapped_files.hold(model, weights.files())
    else:
        fill(distributed.tensors_of_main(tensors))
    return model


class _WithoutMemory:
    """Replaces parameters, as they are registered, by tensors that take no memory.

    Parameters without elements are kept, because they need no weights.
    """

    def __init__(self) -> None:
        # A parameter that several modules share stays shared. An id alone may be used again.
        self._replaced: dict[int, tuple[weakref.ref[nn.Parameter], nn.Parameter]] = {}

    def __call__(self, module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        if parameter.is_meta or not parameter.numel():
            return parameter
        known, meta = self._replaced.get(id(parameter), (None, None))
        if known is None or known() is not parameter or meta is None:
            meta = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            self._replaced[id(parameter)] = weakref.ref(parameter), meta
        return meta

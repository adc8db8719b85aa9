"""Lists the families of backbones, and builds models from a name or an architecture."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fd_large.backbones.custom.family import CUSTOM
from fd_large.backbones.family import Family, Options
from fd_large.backbones.published import WeightFacts
from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.backbones.swin.family import SWIN
from fd_large.backbones.swinv2.family import SWINV2
from fd_large.backbones.timm.family import TIMM
from fd_large.backbones.transformers.family import TRANSFORMERS
from fd_large.backbones.vit.family import VIT
from fd_large.errors import ConfigError, nearest
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.recipes.family import FamilyArchitecture

FAMILIES: dict[str, Family] = {
    family.architecture.family: family for family in (VIT, SWINV2, SWIN, TIMM, TRANSFORMERS, CUSTOM)
}


def family_of(architecture: FamilyArchitecture) -> Family:
    """Returns the family of the model `architecture`.

    Raises: ConfigError: if no family has the name `architecture.family`.
    """
    if architecture.family not in FAMILIES:
        raise ConfigError(
            f"architecture.family: unknown; got {architecture.family!r}, "
            f"{nearest(architecture.family, FAMILIES)}. Use one of these."
        )
    return FAMILIES[architecture.family]


def family_of_source(source: str) -> tuple[Family, str] | None:
    """Returns (family, rest) of a `source` that starts with a family's prefix, such as `timm:`.

    The rest is the part after the prefix. The result is None for other sources, such as paths.
    """
    for family in FAMILIES.values():
        prefix = family.architecture.prefix
        if family.scheme and source.startswith(prefix):
            return family, source.removeprefix(prefix)
    return None


def is_module(source: str) -> bool:
    """Whether `source` names a torch Module that brings its weights and is itself the teacher.

    This is so for `module:FILE.py:NAME`, but not for `timm:NAME` or a path.
    """
    brought = family_of_source(source)
    return brought is not None and brought[0].scheme.weightless is None


def statistics_of(name: str, architecture: FamilyArchitecture) -> Statistics:
    """Returns the image statistics of a model's published weights, or ImageNet's if unknown.

    Args:
        name: Name of the model in `recipes.architectures`.
        architecture: The model.
    """
    facts = _facts_of(name, architecture)
    return facts.statistics if facts else IMAGENET


def own_image_size(name: str, architecture: FamilyArchitecture) -> int:
    """Returns the side in pixels of the images that a model was trained with; 0 if unknown.

    Args:
        name: Name of the model in `recipes.architectures`.
        architecture: The model.
    """
    stated = getattr(architecture, "image_size", 0)
    if stated:
        return stated
    facts = _facts_of(name, architecture)
    return facts.image_size if facts else 0


def _facts_of(name: str, architecture: FamilyArchitecture) -> WeightFacts | None:
    family = family_of(architecture)
    named = family.published.facts.get(name) if family.published else None
    return named or family.facts_of(architecture)


def build(
    model: str | FamilyArchitecture,
    overrides: Architecture | None = None,
    *,
    seed: int | None = None,
    **options: Any,
) -> nn.Module:
    """Builds a model with fresh weights.

    Args:
        model: A model's name in `recipes.architectures`, or a whole architecture.
        overrides: Values that replace fields of the named model, where they are not None.
        seed: Seed of the initial weights; None draws them from torch's global CPU generator in its
            present state.
        options: Values of fields of `backbones.family.Options`, by name.

    Raises: ConfigError: for an unknown name or family, or values that do not fit.
    """
    architecture = resolve(model, overrides) if isinstance(model, str) else model
    family, chosen = family_of(architecture), Options(**options)
    if chosen.size_rule == "pad" and not architecture.can_pad:
        raise ConfigError(
            f"student.size_rule: a {architecture.family} model cannot pad; got 'pad', expected "
            "'drop'. Use an image size that fits."
        )
    if chosen.window_rule != "masked" and not architecture.can_pad:
        raise ConfigError(
            f"student.window_rule: not available for a {architecture.family} model; got "
            f"{chosen.window_rule!r}, expected 'masked'. Leave out student.window_rule."
        )
    if seed is None:
        return family.build(architecture, chosen)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return family.build(architecture, chosen)


@lru_cache(maxsize=16)
def _shapes(architecture: FamilyArchitecture) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        net = build(architecture, initialization="none")
    parameters, tensors = dict(net.named_parameters()), net.state_dict().items()
    statistics = {n: t for n, t in tensors if n not in parameters and t.is_floating_point()}
    return {name: tuple(t.shape) for name, t in (parameters | statistics).items()}


def parameter_shapes(architecture: FamilyArchitecture) -> dict[str, tuple[int, ...]]:
    """Returns {name: shape} of every parameter, in the module's order, without allocating memory.

    The running statistics of batch norms follow the parameters, since they are weights too.

    Raises: ConfigError, ShapeError: if the model cannot be built.
    """
    return dict(_shapes(architecture))

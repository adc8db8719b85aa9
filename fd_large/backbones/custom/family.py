"""Models of the user's own, as the package sees them."""

from __future__ import annotations

from torch import nn

from fd_large.backbones.custom.architecture import CustomArchitecture
from fd_large.backbones.custom.custom import build_own
from fd_large.backbones.family import Family, Loaded, Options, Scheme
from fd_large.recipes.architectures import Architecture


def _build(architecture: CustomArchitecture, options: Options) -> nn.Module:
    return build_own(architecture.function)


def _settle(function: str, given: Architecture, where: str) -> tuple[Architecture, list[str]]:
    return Architecture(family=CustomArchitecture.family, function=function), []


def _load(function: str, where: str) -> Loaded:
    net = build_own(function, where=f"{where} module")
    return Loaded(net, getattr(net, "statistics", None))


CUSTOM = Family(
    architecture=CustomArchitecture,
    build=_build,
    scheme=Scheme(settle=_settle, load=_load),
)

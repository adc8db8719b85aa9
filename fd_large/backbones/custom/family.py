"""Models of the user's own, as the package sees them."""

from __future__ import annotations

from fd_large.backbones.custom.architecture import CustomArchitecture
from fd_large.backbones.custom.custom import build_custom
from fd_large.backbones.family import Family, Loaded, Options, Scheme
from fd_large.recipes.architectures import Architecture


def _settle(function: str, given: Architecture, where: str) -> tuple[Architecture, list[str]]:
    return Architecture(family=CustomArchitecture.family, function=function), []


def _load(function: str, where: str) -> Loaded:
    net = build_custom(CustomArchitecture(function=function), Options(), where=where)
    return Loaded(net, getattr(net, "statistics", None))


CUSTOM = Family(
    architecture=CustomArchitecture,
    build=build_custom,
    scheme=Scheme(settle=_settle, load=_load),
)
"""`module:...` in place of weights is a module that brings its own."""

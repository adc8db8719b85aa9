"""Backbones of timm, as the package sees them; timm is imported only where it is needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fd_large.backbones.family import Family, Loaded, Options, Scheme
from fd_large.backbones.timm.architecture import TimmArchitecture
from fd_large.recipes.architectures import Architecture

if TYPE_CHECKING:
    from fd_large.backbones.published import Matched, WeightFacts
    from fd_large.backbones.translation import Shapes


def _published() -> Any:
    # timm takes a second to import, which other models are spared.
    from fd_large.backbones.timm import published

    return published


def _build(architecture: TimmArchitecture, options: Options) -> nn.Module:
    from fd_large.backbones.timm.timm_backbone import TimmBackbone

    return TimmBackbone(architecture.timm_name, stride=architecture.feature_stride)


def _matched(architecture: TimmArchitecture, file: Shapes, where: str) -> Matched:
    return _published().matched(architecture, file, where=where)


def _facts_of(architecture: TimmArchitecture) -> WeightFacts:
    return _published().facts_of(architecture)


def _settle(name: str, given: Architecture, where: str) -> tuple[Architecture, list[str]]:
    return _published().of_source(name, given, where)


def _load(name: str, where: str) -> Loaded:
    return Loaded(_published().pretrained(name, where), _published().statistics_of(name))


def _weightless(name: str, where: str) -> Mapping[str, Tensor]:
    _published().refuse_untrained(name, where)
    return _published().weightless(name)


TIMM = Family(
    architecture=TimmArchitecture,
    build=_build,
    matched=_matched,
    facts_of=_facts_of,
    scheme=Scheme(prefix="timm:", settle=_settle, load=_load, weightless=_weightless),
)

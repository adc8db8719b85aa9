"""Backbones of timm, as the package sees them; timm is imported only where it is needed."""

from __future__ import annotations

from torch import nn

from fd_large.backbones.family import Family, Options
from fd_large.backbones.timm.architecture import TimmArchitecture


def _build(architecture: TimmArchitecture, options: Options) -> nn.Module:
    from fd_large.backbones.timm.timm_backbone import TimmBackbone

    return TimmBackbone(architecture.timm_name, stride=architecture.feature_stride)


TIMM = Family(architecture=TimmArchitecture, build=_build)

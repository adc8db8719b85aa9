"""The `Family` of SwinV2."""

from fd_large.backbones.family import Family
from fd_large.backbones.swinv2.architecture import SwinV2Architecture
from fd_large.backbones.swinv2.export import EXPORTS
from fd_large.backbones.swinv2.published import PUBLISHED
from fd_large.backbones.swinv2.swinv2 import build

SWINV2 = Family(architecture=SwinV2Architecture, build=build, published=PUBLISHED, exports=EXPORTS)

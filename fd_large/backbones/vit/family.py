"""The `Family` of vision transformers."""

from fd_large.backbones.family import Family
from fd_large.backbones.vit.architecture import ViTArchitecture
from fd_large.backbones.vit.export import EXPORTS
from fd_large.backbones.vit.published import PUBLISHED
from fd_large.backbones.vit.vit import build

VIT = Family(architecture=ViTArchitecture, build=build, published=PUBLISHED, exports=EXPORTS)

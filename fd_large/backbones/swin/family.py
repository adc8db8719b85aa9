"""The `Family` of Swin Transformer, first version."""

from fd_large.backbones.family import Family
from fd_large.backbones.swin.architecture import SwinArchitecture
from fd_large.backbones.swin.export import EXPORTS
from fd_large.backbones.swin.published import PUBLISHED
from fd_large.backbones.swin.swin import build

SWIN = Family(architecture=SwinArchitecture, build=build, published=PUBLISHED, exports=EXPORTS)

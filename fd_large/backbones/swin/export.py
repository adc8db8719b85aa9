"""A Swin of the first version in timm, and in the official names."""

from __future__ import annotations

from fd_large.backbones import hierarchical_export as shared
from fd_large.backbones.exports import Export, Exports, same
from fd_large.backbones.swin.architecture import SwinArchitecture


def _timm_has_no_place(a: SwinArchitecture) -> str:
    return "its Swin models have no absolute positions" if a.absolute_position else ""


EXPORTS: Exports = {
    "timm": Export(
        names=lambda a: "timm's Swin",
        outputs=lambda name, shape, a: same(shared.timm_name(name, a), shape),
        lacks=shared.lacks,
        config=lambda a, statistics: shared.config(a, statistics, "swin_base_patch4_window7_224"),
        class_name=lambda a: "timm.models.swin_transformer.SwinTransformer",
        rename=shared.timm_name,
        lacks_place=_timm_has_no_place,
    ),
    # Feature-Distillation has no such model.
    "fd": Export(names=lambda a: shared.NAMES, outputs=lambda name, shape, a: same(name, shape)),
}

"""Exports SwinV2 models to timm and transformers, or with the tensor names of other code.

The format "mmseg" has the names of the Swin-Transformer repository, since mmsegmentation has no
SwinV2. The format "fd" has the names of Feature-Distillation; models with norms on the main path,
which Feature-Distillation lacks, keep the names of the Swin-Transformer repository.
"""

from __future__ import annotations

from typing import Any

from fd_large.backbones import hierarchical_export as shared
from fd_large.backbones.exports import (
    Export,
    Exports,
    hugging_face_preprocessor,
)
from fd_large.backbones.hierarchical_published import HF_SWINV2, TIMM
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.swinv2.architecture import SwinV2Architecture
from fd_large.backbones.swinv2.published import STUDENT

# timm's entry whose arguments are the nearest; config.json overrides all of them.
_TIMM_ENTRIES = {
    (96, (2, 2, 6, 2)): "swinv2_tiny_window8_256",
    (96, (2, 2, 18, 2)): "swinv2_small_window8_256",
    (192, (2, 2, 18, 2)): "swinv2_large_window12_192",
}


def _lacks(a: SwinV2Architecture, pads: bool) -> str:
    if a.has_extra_norms:
        return f"extra_norm_every {a.extra_norm_every}, expected no norms on the main path"
    if a.shared_position_bias:
        return "a shared position bias, expected a bias per block"
    return shared.lacks(a, pads)


def _timm_has_no_place(a: SwinV2Architecture) -> str:
    if a.extra_norm_every:
        return "its SwinV2 has no norms on the main path"
    if a.shared_position_bias:
        return "its SwinV2 has a position bias per block"
    return "its Swin models have no absolute positions" if a.absolute_position else ""


def _timm_lacks(a: SwinV2Architecture, pads: bool) -> str:
    lacks = _lacks(a, pads)
    if lacks or not _timm_has_no_place(a):
        return lacks
    return f"a swinv2 model that timm does not have: {_timm_has_no_place(a)}"


def _timm_config(a: SwinV2Architecture, statistics: Statistics) -> dict[str, Any]:
    entry = _TIMM_ENTRIES.get((a.embed_dim, a.depths), "swinv2_base_window8_256")
    windows = list(a.pretrained_window_sizes)
    return shared.config(a, statistics, entry, pretrained_window_sizes=windows)


def _hugging_face_config(a: SwinV2Architecture, statistics: Statistics) -> dict[str, Any]:
    windows = list(a.pretrained_window_sizes)
    return shared.hugging_face(a, "Swinv2Model", pretrained_window_sizes=windows)


def _fd_names(a: SwinV2Architecture) -> str:
    if a.has_extra_norms:
        return f"{shared.NAMES}; norms on the main path are `layers.S.blocks.B.extra_norm`"
    return "the names of the Feature-Distillation repository"


EXPORTS: Exports = {
    "timm": Export(
        names=lambda a: "timm's SwinV2",
        rows=lambda a: TIMM,
        lacks=_timm_lacks,
        config=_timm_config,
        class_name=lambda a: "timm.models.swin_transformer_v2.SwinTransformerV2",
        lacks_place=_timm_has_no_place,
        window_rule="masked",
    ),
    "hf": Export(
        names=lambda a: "Hugging Face's Swinv2Model",
        rows=lambda a: HF_SWINV2,
        lacks=_lacks,
        config=_hugging_face_config,
        preprocessor=hugging_face_preprocessor,
        class_name=lambda a: "Swinv2Model",
        window_rule="masked",
    ),
    # mmsegmentation has no SwinV2: names for code of the user's own.
    "mmseg": Export(names=lambda a: shared.NAMES),
    # Feature-Distillation has no norms on the main path.
    "fd": Export(names=_fd_names, rows=lambda a: () if a.has_extra_norms else STUDENT),
}

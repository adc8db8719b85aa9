"""Exports Swin models of the first version to other libraries, or in the official names."""

from __future__ import annotations

from typing import Any

from fd_large.backbones import hierarchical_export as shared
from fd_large.backbones.exports import (
    Export,
    Exports,
    hugging_face_preprocessor,
)
from fd_large.backbones.hierarchical_published import HF_SWIN, MMSEG, TIMM
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.swin.architecture import SwinArchitecture


def _timm_has_no_place(a: SwinArchitecture) -> str:
    return "its Swin models have no absolute positions" if a.absolute_position else ""


def _dense_lacks(a: SwinArchitecture, pads: bool) -> str:
    """Returns why mmsegmentation's Swin or transformers' UPerNet cannot hold the model, in words.

    The result is "" if both can.

    Args:
        a: The model.
        pads: Not used.
    """
    side = a.image_size // a.patch_size // 2 ** (len(a.depths) - 1)
    if side < a.window_size:
        return f"position tables of fewer than {a.window_size} tokens, expected tables of one size"
    if a.absolute_position or not a.patch_norm:
        return (
            "absolute positions, or no norm after the patch embedding, expected that norm and "
            "no absolute positions"
        )
    return "" if a.norm_eps == 1e-5 else f"norm_eps {a.norm_eps:g}, expected 1e-05"


def _hugging_face_config(a: SwinArchitecture, statistics: Statistics) -> dict[str, Any]:
    stages = [f"stage{stage + 1}" for stage in range(len(a.depths))]
    return shared.hugging_face(a, "SwinBackbone", model_type="swin", out_features=stages)


def _mmseg_config(a: SwinArchitecture, statistics: Statistics) -> dict[str, Any]:
    return {
        "type": "SwinTransformer",
        "pretrain_img_size": a.image_size,
        "embed_dims": a.embed_dim,
        "patch_size": a.patch_size,
        "window_size": a.window_size,
        "mlp_ratio": a.mlp_ratio,
        "depths": list(a.depths),
        "num_heads": list(a.num_heads),
        "strides": [a.patch_size] + [2] * (len(a.depths) - 1),
        "out_indices": list(range(len(a.depths))),
        "qkv_bias": a.qkv_bias != "none",
        "drop_path_rate": 0.0,
    }


EXPORTS: Exports = {
    "timm": Export(
        names=lambda a: "timm's Swin",
        rows=lambda a: TIMM,
        lacks=shared.lacks,
        config=lambda a, statistics: shared.config(a, statistics, "swin_base_patch4_window7_224"),
        class_name=lambda a: "timm.models.swin_transformer.SwinTransformer",
        lacks_place=_timm_has_no_place,
        window_rule="masked",
    ),
    "mmseg": Export(
        names=lambda a: "mmsegmentation's SwinTransformer",
        rows=lambda a: MMSEG,
        lacks=_dense_lacks,
        config=_mmseg_config,
        window_rule="official",
    ),
    "upernet": Export(
        names=lambda a: "Hugging Face's SwinBackbone",
        rows=lambda a: HF_SWIN,
        lacks=_dense_lacks,
        config=_hugging_face_config,
        preprocessor=hugging_face_preprocessor,
        window_rule="official",
    ),
    # Feature-Distillation has no such model.
    "fd": Export(names=lambda a: shared.NAMES),
}

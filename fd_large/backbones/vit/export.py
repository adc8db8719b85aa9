"""Exports ViT models to other libraries, such as timm, or in Feature-Distillation's names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fd_large.backbones.exports import (
    Export,
    Exports,
    hugging_face_config,
    hugging_face_preprocessor,
    timm_config,
)
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.translation import FEATURE_DISTILLATION
from fd_large.backbones.vit.architecture import ViTArchitecture
from fd_large.backbones.vit.published import HF_BEIT, HF_VIT, MMSEG, TIMM_VIT

_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"


def is_beit(a: ViTArchitecture) -> bool:
    """Whether other libraries call the ViT a BEiT.

    The result is True if the model has relative positions, or has biases of query and value but not
    of key.
    """
    return a.relative_position != "none" or a.qkv_bias == "qv"


def _in_blocks(name: str, a: ViTArchitecture) -> list[str]:
    """Returns the names of one of our tensors in an export whose blocks have a table each.

    As in timm's beit_* models, the shared table of relative positions has a name in every block.

    Args:
        name: Our name of the tensor. For any tensor but the shared table the result is [name].
        a: Our model.
    """
    if name != _SHARED_TABLE:
        return [name]
    return [f"blocks.{i}.attn.relative_position_bias_table" for i in range(a.depths[0])]


def _timm_has_no_place(a: ViTArchitecture) -> str:
    if a.num_registers and (is_beit(a) or (a.class_token and a.class_position)):
        return "only its ViTs without a position of the class token have registers"
    if is_beit(a) and not a.class_position:
        return "the class token of its BEiT has a position"
    if is_beit(a):
        fits = a.qkv_bias == "qv" and a.class_token and not a.pre_norm_layer and a.patch_bias
        return (
            ""
            if fits
            else "its BEiT has q and v biases, a class token, and no norm before the blocks"
        )
    return "its ViT has one bias vector for query, key and value" if a.qkv_bias == "qkv" else ""


def _timm_lacks(a: ViTArchitecture, pads: bool) -> str:
    if a.distillation_token:
        return "a distillation token, expected none"
    if a.norm_eps != 1e-6:
        return f"norm_eps {a.norm_eps:g}, expected 1e-06"
    if is_beit(a) and a.activation != "gelu":
        return f"activation {a.activation}, expected gelu"
    if not is_beit(a) and a.patch_bias == a.pre_norm_layer:
        return "a patch bias and a norm before the blocks, or neither, expected exactly one of them"
    lacks = _timm_has_no_place(a)
    return f"a vit model that timm does not have: {lacks}" if lacks else ""


def _timm_config(a: ViTArchitecture, statistics: Statistics) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "depth": a.depths[0],
        "num_heads": a.num_heads[0],
        "init_values": a.layer_scale or None,
        "global_pool": "token" if a.class_token else "avg",
    }
    if is_beit(a):
        arguments |= {
            "use_abs_pos_emb": a.absolute_position,
            "use_rel_pos_bias": a.relative_position != "none",
        }
    else:
        arguments |= {
            "class_token": a.class_token,
            "pos_embed": "learn" if a.absolute_position else "none",
            "pre_norm": a.pre_norm_layer,
            "act_layer": a.activation,
            "fc_norm": False,
        }
        if a.num_registers or not a.class_position:
            arguments |= {"reg_tokens": a.num_registers, "no_embed_class": True}
    size = "large" if (a.embed_dim, a.depths) == (1024, (24,)) else "base"
    return timm_config(
        a,
        statistics,
        entry=f"{'beit' if is_beit(a) else 'vit'}_{size}_patch16_224",
        pool=arguments["global_pool"],
        arguments=arguments,
    )


def _timm_class(a: ViTArchitecture) -> str:
    beit = "timm.models.beit.Beit"
    return beit if is_beit(a) else "timm.models.vision_transformer.VisionTransformer"


def _hugging_face_class(a: ViTArchitecture) -> str:
    return "BeitModel" if is_beit(a) else "ViTModel"


def _hugging_face_lacks(a: ViTArchitecture, pads: bool) -> str:
    if a.distillation_token:
        return "a distillation token, expected none"
    if a.num_registers or not a.class_position:
        return "registers, or a class token without a position, expected neither"
    if is_beit(a):
        fits = a.qkv_bias == "qv" and a.class_token
    else:
        fits = a.class_token and a.absolute_position and not a.layer_scale and a.qkv_bias != "qkv"
    if fits and a.patch_bias and not a.pre_norm_layer:
        return ""
    return (
        "a vit model of another design, expected q and v biases with relative positions, or "
        "absolute positions without layer scale; with a class token, and no norm before the blocks"
    )


def _hugging_face_config(a: ViTArchitecture, statistics: Statistics) -> dict[str, Any]:
    common = hugging_face_config(a, _hugging_face_class(a)) | {
        "hidden_size": a.embed_dim,
        "intermediate_size": round(a.embed_dim * a.mlp_ratio),
        "num_hidden_layers": a.depths[0],
        "num_attention_heads": a.num_heads[0],
        "hidden_act": a.activation,
    }
    if not is_beit(a):
        return common | {"qkv_bias": a.qkv_bias != "none"}
    return common | {
        "use_absolute_position_embeddings": a.absolute_position,
        "use_relative_position_bias": a.relative_position == "block",
        "use_shared_relative_position_bias": a.relative_position == "shared",
        "layer_scale_init_value": float(a.layer_scale),
        "use_mean_pooling": False,
        "use_mask_token": False,
        "drop_path_rate": 0.0,
    }


def _mmseg_lacks(a: ViTArchitecture, pads: bool) -> str:
    biases = ("fused",) if a.absolute_position else ("qv", "none")
    fits = a.qkv_bias in biases and a.class_token and not a.distillation_token and a.patch_bias
    fits = fits and a.class_position and not a.num_registers
    if fits and not a.pre_norm_layer and a.activation == "gelu" and a.mlp_ratio % 1 == 0:
        return ""
    return (
        "a vit model of another design, expected a BEiT (no absolute positions, q and v biases) "
        "or an MAE (absolute positions, one bias), with a class token and a whole mlp_ratio"
    )


def _mmseg_added(a: ViTArchitecture) -> Mapping[str, Tensor]:
    """Returns {name: tensor} of tensors that mmsegmentation's model has and ours lacks.

    These tensors change no result. They are position tables of zeros, if our model has no relative
    positions, and layer scales of one, if it has no layer scales.
    """
    side = a.image_size // a.patch_size
    added = {}
    for i in range(a.depths[0]):
        if a.relative_position == "none":
            rows = (2 * side - 1) ** 2 + 3
            table = torch.zeros(rows, a.num_heads[0])
            added[f"layers.{i}.attn.relative_position_bias_table"] = table
        if not a.layer_scale:
            added |= {f"layers.{i}.gamma_{n}": torch.ones(a.embed_dim) for n in (1, 2)}
    return added


def _mmseg_config(a: ViTArchitecture, statistics: Statistics) -> dict[str, Any]:
    return {
        "type": "MAE" if a.absolute_position else "BEiT",
        "img_size": [a.image_size, a.image_size],
        "patch_size": a.patch_size,
        "embed_dims": a.embed_dim,
        "num_layers": a.depths[0],
        "num_heads": a.num_heads[0],
        "mlp_ratio": int(a.mlp_ratio),
        **({} if a.absolute_position else {"qv_bias": a.qkv_bias == "qv"}),
        "norm_cfg": {"type": "LN", "eps": a.norm_eps},
        "init_values": a.layer_scale or 1.0,
    }


def _upernet_lacks(a: ViTArchitecture, pads: bool) -> str:
    if not is_beit(a):
        return "a vit model without relative positions and biases of query and value alone"
    if a.activation != "gelu":
        return f"activation {a.activation}, expected gelu"
    return _hugging_face_lacks(a, pads)


def _upernet_config(a: ViTArchitecture, statistics: Statistics) -> dict[str, Any]:
    config = _hugging_face_config(a.with_own_position_biases(), statistics)
    return config | {"add_fpn": True, "reshape_hidden_states": True}


EXPORTS: Exports = {
    "timm": Export(
        names=lambda a: "timm's BEiT" if is_beit(a) else "timm's ViT",
        rows=lambda a: () if is_beit(a) else TIMM_VIT,
        copies=_in_blocks,
        lacks=_timm_lacks,
        becomes=lambda a: a.with_own_position_biases(),
        config=_timm_config,
        class_name=_timm_class,
        lacks_place=_timm_has_no_place,
    ),
    "hf": Export(
        names=lambda a: f"Hugging Face's {_hugging_face_class(a)}",
        rows=lambda a: HF_BEIT if is_beit(a) else HF_VIT,
        lacks=_hugging_face_lacks,
        config=_hugging_face_config,
        preprocessor=hugging_face_preprocessor,
        class_name=_hugging_face_class,
    ),
    "mmseg": Export(
        names=lambda a: f"mmsegmentation's {'MAE' if a.absolute_position else 'BEiT'}",
        rows=lambda a: MMSEG,
        copies=_in_blocks,
        lacks=_mmseg_lacks,
        added=_mmseg_added,
        becomes=lambda a: replace(a, relative_position="block", layer_scale=a.layer_scale or 1.0),
        config=_mmseg_config,
    ),
    "upernet": Export(
        names=lambda a: "Hugging Face's BeitBackbone",
        # transformers 5 does not find a shared table under the backbone of another model.
        rows=lambda a: HF_BEIT,
        copies=_in_blocks,
        lacks=_upernet_lacks,
        becomes=lambda a: a.with_own_position_biases(),
        config=_upernet_config,
        preprocessor=hugging_face_preprocessor,
    ),
    "fd": Export(
        names=lambda a: "the names of the Feature-Distillation repository",
        rows=lambda a: FEATURE_DISTILLATION,
    ),
}

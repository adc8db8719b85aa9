"""What stands beside exported tensors: config.json; and whether a format has such a model at all."""

from __future__ import annotations

from typing import Any

from fd_large.backbones.statistics import Statistics
from fd_large.errors import ConfigError
from fd_large.recipes.family import Transformer
from fd_large.weights.export_names import has_extra_norms, in_official_names
from fd_large.weights.write import config, is_beit, lacks_in_timm

EXPORTS = {
    "timm": "timm's SwinV2, Swin, BEiT or ViT",
    "hf": "Hugging Face's Swinv2Model, BeitModel or ViTModel",
    "fd": "the names of the Feature-Distillation repository",
}
# timm's entry whose arguments are the nearest; config.json overrides all of them.
_TIMM_ENTRIES = {
    "swin": {"": "swin_base_patch4_window7_224"},
    "swinv2": {
        "": "swinv2_base_window8_256",
        (96, (2, 2, 6, 2)): "swinv2_tiny_window8_256",
        (96, (2, 2, 18, 2)): "swinv2_small_window8_256",
        (192, (2, 2, 18, 2)): "swinv2_large_window12_192",
    },
    "beit": {"": "beit_base_patch16_224", (1024, (24,)): "beit_large_patch16_224"},
    "vit": {"": "vit_base_patch16_224", (1024, (24,)): "vit_large_patch16_224"},
}


def check(architecture: Transformer, to: str, *, pads: bool) -> None:
    """Refuses a model that the format does not have.

    Args:
        architecture: With the image size of the run.
        to: One of EXPORTS.
        pads: Whether the run pads images that do not fit.

    Raises: ConfigError: naming the formats that have it.
    """
    lacks = {form: _lacks(architecture, form, pads) for form in EXPORTS}
    if lacks[to]:
        able = [f"--to {form}" for form in EXPORTS if not lacks[form]]
        remedy = f"Use {' or '.join(able)}" if able else "No format has it: keep the checkpoint"
        raise ConfigError(
            f"export: --to {to}: {EXPORTS[to]} cannot hold this student; got {lacks[to]}. {remedy}."
        )


def configuration(architecture: Transformer, to: str, statistics: Statistics) -> dict[str, Any]:
    """Returns config.json: what the format's own loader reads, and what ours does.

    Args:
        architecture: With the image size of the run.
        to: One of EXPORTS, checked.
        statistics: By which images are normalised.
    """
    # timm's beit_* have a table in every block.
    own = architecture.with_own_position_biases() if to == "timm" else architecture
    theirs: dict[str, Any] = {}
    if to == "timm":
        theirs = _timm(architecture, statistics)
    elif to == "hf":
        theirs = _hugging_face(architecture)
    return theirs | config(own, statistics)


def naming(architecture: Transformer, to: str) -> str:
    """Says whose names the tensors have."""
    if to == "fd" and in_official_names(architecture):
        extra = "; norms on the main path are `layers.S.blocks.B.extra_norm`"
        extra = extra if has_extra_norms(architecture) else ""
        return f"the names of the Swin-Transformer repository{extra}"
    return EXPORTS[to]


def timm_class(architecture: Transformer) -> str:
    """Returns timm's class of the net."""
    return {
        "swin": "timm.models.swin_transformer.SwinTransformer",
        "swinv2": "timm.models.swin_transformer_v2.SwinTransformerV2",
        "beit": "timm.models.beit.Beit",
        "vit": "timm.models.vision_transformer.VisionTransformer",
    }[_timm_family(architecture)]


def hugging_face_class(architecture: Transformer) -> str:
    """Returns transformers' class of the net."""
    if architecture.family == "vit":
        return "BeitModel" if is_beit(architecture) else "ViTModel"
    return "Swinv2Model"


def _lacks(a: Transformer, to: str, pads: bool) -> str:
    """What a format has not; empty: it has all."""
    if to == "fd":
        return ""
    if a.family.startswith("swin"):
        if has_extra_norms(a):
            return f"extra_norm_every {a.extra_norm_every}, expected no norms on the main path"
        if getattr(a, "shared_position_bias", False):
            return "a shared position bias, expected one per block"
        if pads and not _fits(a):
            return (
                f"size_rule pad, which masks what {a.image_size} px leaves empty, expected an "
                "image size that fits"
            )
        if not a.patch_norm:
            return "no norm after the patch embedding, expected one"
        if a.absolute_position:
            return "absolute positions, expected none"
        if a.norm_eps != 1e-5:
            return f"norm_eps {a.norm_eps:g}, expected 1e-05"
    if a.family == "vit" and a.distillation_token:
        return "a distillation token, expected none"
    if to == "hf":
        return _lacks_in_transformers(a)
    if a.family == "vit":
        beit = is_beit(a)
        if a.norm_eps != 1e-6:
            return f"norm_eps {a.norm_eps:g}, expected 1e-06"
        if beit and a.activation != "gelu":
            return f"activation {a.activation}, expected gelu"
        if not beit and a.patch_bias == a.pre_norm_layer:
            return "a patch bias beside a norm before the blocks (or neither), expected one"
    lacks = lacks_in_timm(a)
    return f"a {a.family} model of which timm has no like: {lacks}" if lacks else ""


def _lacks_in_transformers(a: Transformer) -> str:
    if a.family == "swin":
        return "a swin model, expected swinv2 or vit"
    if a.family == "swinv2":
        return ""
    if is_beit(a):
        fits = a.qkv_bias == "qv" and a.class_token
    else:
        fits = a.class_token and a.absolute_position and not a.layer_scale and a.qkv_bias != "qkv"
    if not fits or a.pre_norm_layer or not a.patch_bias:
        return (
            "a vit model of another make, expected q and v biases with relative positions, or "
            "absolute positions without layer scale; with a class token, and no norm before"
        )
    return ""


def _fits(a: Transformer) -> bool:
    """Whether every stage divides into windows and merges without padding."""
    side, rest = divmod(a.image_size, a.patch_size)
    for stage in range(len(a.depths)):
        rest += side % min(a.window_size, side) if side else 1
        if stage + 1 < len(a.depths):
            side, odd = divmod(side, 2)
            rest += odd
    return rest == 0


def _timm_family(a: Transformer) -> str:
    return "beit" if a.family == "vit" and is_beit(a) else a.family


def _timm(a: Transformer, statistics: Statistics) -> dict[str, Any]:
    family = _timm_family(a)
    entries = _TIMM_ENTRIES[family]
    arguments: dict[str, Any] = {
        "img_size": a.image_size,
        "patch_size": a.patch_size,
        "embed_dim": a.embed_dim,
        "mlp_ratio": a.mlp_ratio,
        "qkv_bias": a.qkv_bias != "none",
    }
    if a.family == "vit":
        pool = "token" if a.class_token else "avg"
        arguments |= {
            "depth": a.depths[0],
            "num_heads": a.num_heads[0],
            "init_values": a.layer_scale or None,
            "global_pool": pool,
        }
        if family == "beit":
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
    else:
        pool = "avg"
        arguments |= {
            "depths": list(a.depths),
            "num_heads": list(a.num_heads),
            "window_size": a.window_size,
        }
        if family == "swinv2":
            arguments["pretrained_window_sizes"] = list(a.pretrained_window_sizes)
    return {
        "architecture": entries.get((a.embed_dim, a.depths), entries[""]),
        "num_classes": 0,
        "num_features": a.width,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "num_classes": 0,
            "input_size": [3, a.image_size, a.image_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "mean": list(statistics.mean),
            "std": list(statistics.std),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _hugging_face(a: Transformer) -> dict[str, Any]:
    theirs = hugging_face_class(a)
    common = {
        "architectures": [theirs],
        "model_type": theirs.removesuffix("Model").lower(),
        "dtype": "float32",
        "image_size": a.image_size,
        "patch_size": a.patch_size,
        "num_channels": 3,
        "layer_norm_eps": a.norm_eps,
    }
    if a.family == "vit":
        common |= {
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
    return common | {
        "embed_dim": a.embed_dim,
        "depths": list(a.depths),
        "num_heads": list(a.num_heads),
        "window_size": a.window_size,
        "pretrained_window_sizes": list(a.pretrained_window_sizes),
        "mlp_ratio": a.mlp_ratio,
        "qkv_bias": a.qkv_bias != "none",
        "hidden_act": "gelu",
        "use_absolute_embeddings": False,
        "drop_path_rate": 0.0,
    }

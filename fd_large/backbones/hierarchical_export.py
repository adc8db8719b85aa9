"""Export code that Swin and SwinV2 share."""

from __future__ import annotations

from typing import Any

from fd_large.backbones.exports import hugging_face_config, timm_config
from fd_large.backbones.statistics import Statistics
from fd_large.recipes.family import WindowedTransformer

NAMES = "the names of the Swin-Transformer repository"


def lacks(a: WindowedTransformer, pads: bool) -> str:
    """Returns why timm and transformers cannot hold the model, or "" if they can.

    The reason is a text for a message, such as "absolute positions, expected none".

    Args:
        a: The model.
        pads: Whether images are padded (`size_rule` "pad").
    """
    if pads and not _fits(a):
        return (
            f"size_rule pad, which masks the padding at {a.image_size} px, expected an image size "
            "without padding"
        )
    if not a.patch_norm:
        return "no norm after the patch embedding, expected a norm"
    if a.absolute_position:
        return "absolute positions, expected none"
    return "" if a.norm_eps == 1e-5 else f"norm_eps {a.norm_eps:g}, expected 1e-05"


def config(
    a: WindowedTransformer, statistics: Statistics, entry: str, **arguments: Any
) -> dict[str, Any]:
    """Returns the contents of timm's config.json for a model of either Swin family.

    Args:
        a: The model.
        statistics: Mean and standard deviation by which images are normalised.
        entry: Name of timm's most similar model.
        arguments: Arguments of timm's model that only this family has.
    """
    model_arguments = {
        "depths": list(a.depths),
        "num_heads": list(a.num_heads),
        "window_size": a.window_size,
        **arguments,
    }
    return timm_config(a, statistics, entry=entry, pool="avg", arguments=model_arguments)


def hugging_face(a: WindowedTransformer, class_name: str, **values: Any) -> dict[str, Any]:
    """Returns the contents of transformers' config.json for a model of either Swin family.

    Args:
        a: The model.
        class_name: transformers' class of the model.
        values: Fields that are added or replaced.
    """
    return hugging_face_config(a, class_name) | {
        "embed_dim": a.embed_dim,
        "depths": list(a.depths),
        "num_heads": list(a.num_heads),
        "window_size": a.window_size,
        "mlp_ratio": a.mlp_ratio,
        "qkv_bias": a.qkv_bias != "none",
        "hidden_act": "gelu",
        "use_absolute_embeddings": False,
        "drop_path_rate": 0.0,
        **values,
    }


def _fits(a: WindowedTransformer) -> bool:
    """Whether images of the model's `image_size` need no padding in any stage.

    Padding may be needed for patches, for windows or for patch merging.
    """
    side, rest = divmod(a.image_size, a.patch_size)
    for stage in range(len(a.depths)):
        rest += side % min(a.window_size, side) if side else 1
        if stage + 1 < len(a.depths):
            side, odd = divmod(side, 2)
            rest += odd
    return rest == 0

"""Tensor names and architecture fields that published files of Swin and SwinV2 have in common."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from fd_large.backbones.published import Format, TargetModel
from fd_large.backbones.recognition import activation_named, count_of, mlp_ratio, qkv_bias, side_of
from fd_large.backbones.statistics import IMAGENET
from fd_large.backbones.translation import (
    COMPUTED,
    Pieces,
    Shapes,
    fresh_norm,
    table,
)
from fd_large.recipes.architectures import Architecture

# The facts of all published files except those of transformers.
imagenet_format = partial(Format, facts=Architecture(norm_eps=1e-5), statistics=IMAGENET)

# --- tables of names; what no row has keeps its name ---

# Swin-Transformer's, EsViT's and our own files.
OF_OFFICIAL = f"""
{COMPUTED}
{{head|head_dense}}.*   -
"""
OFFICIAL = table(OF_OFFICIAL)
OF_SIMMIM = f"""
{OF_OFFICIAL}
mask_token              -
decoder.*               -
*                       *
"""
# In timm patch merging begins a stage; in this package it ends the stage before.
_OF_TIMM = """
*.k_bias                -
layers.+.downsample.*   layers.#.downsample.*
"""
TIMM = table(OF_OFFICIAL + _OF_TIMM)
# Patches are merged by nn.Unfold.
_OF_MMSEG = """
patch_embed.projection.*    patch_embed.proj.*
stages.#.blocks.#.          layers.#.blocks.#.
    attn.w_msa.*            attn.*
    ffn.layers.0.0.*        mlp.fc1.*
    ffn.layers.1.*          mlp.fc2.*
stages.#.downsample.*       layers.#.downsample.*   unfolded
stages.*                    layers.*
"""
MMSEG = table(OF_OFFICIAL + _OF_MMSEG)
_OF_HF = """
{classifier|pooler|decoder}.*                       -
embeddings.mask_token                               -
embeddings.patch_embeddings.projection.*            patch_embed.proj.*
embeddings.norm.*                                   patch_embed.norm.*
embeddings.position_embeddings                      absolute_pos_embed
encoder.layers.#.blocks.#.                          layers.#.blocks.#.
    layernorm_before.*                              norm1.*
    layernorm_after.*                               norm2.*
    attention.output.dense.*                        attn.proj.*
    attention.self.query.*                          attn.qkv.*      q
    attention.self.key.*                            attn.qkv.*      k
    attention.self.value.*                          attn.qkv.*      v
    attention.self.continuous_position_bias_mlp.*   attn.cpb_mlp.*
    attention.self.*                                attn.*
    intermediate.dense.*                            mlp.fc1.*
    output.dense.*                                  mlp.fc2.*
encoder.layers.*                                    layers.*
layernorm.*                                         norm.*
*                                                   *
"""
_OF_HF_SWINV2 = """
encoder.layers.#.blocks.#.                          layers.#.blocks.#.
    attention.self.query.bias                       attn.q_bias
    attention.self.key.bias                         attn.k_bias
    attention.self.value.bias                       attn.v_bias
"""
HF_SWIN = table(COMPUTED + _OF_HF, start="{|swin.}")
HF_SWINV2 = table(COMPUTED + _OF_HF_SWINV2 + _OF_HF, start="{|swinv2.}")


def _has_first(fact: tuple[int, ...], requested: tuple[int, ...], depths: tuple[int, ...]) -> bool:
    return tuple(fact[: len(requested)]) == tuple(requested)


FREE = frozenset({"image_size", "window_size"})
# A model may have the first stages alone.
AGREE = {"depths": _has_first, "num_heads": _has_first}


def first_stages(pieces: Pieces, target: TargetModel) -> tuple[Pieces, list[str]]:
    """Adapts a file's tensors to a model that has only the first stages of the file's model.

    Feature-Distillation's teacher for targets from stage 3 is such a model. The file's later
    stages, the patch merging before these stages and the file's final norm, which belongs to a
    wider map, are left out. The model's final norm gets weight 1 and bias 0.

    Args:
        pieces: {our name: rule that makes the tensor} of the file.
        target: The model; `found.depths` are the file's depths.

    Returns: the rules for the model, and a description of the change for the log, in a list that
        is empty if nothing changes.
    """
    depths = target.found.depths or ()
    stages = len(target.architecture.depths)
    if stages >= len(depths):
        return pieces, []
    stage_pieces = {}
    for name, piece in pieces.items():
        stage = re.match(r"layers\.(\d+)\.", name)
        beyond = stage and int(stage[1]) >= stages
        if not (beyond or name.startswith((f"layers.{stages - 1}.downsample.", "norm."))):
            stage_pieces[name] = piece
    return stage_pieces | fresh_norm(target.architecture.width), [
        f"the first {stages} of {len(depths)} stages, and a final norm with weight 1 and bias 0"
    ]


def recognised(shapes: Shapes) -> dict[str, Any]:
    """Returns {field: value} of the architecture fields that Swin and SwinV2 files show alike.

    The fields `embed_dim`, `depths`, `patch_size`, `mlp_ratio`, `qkv_bias`, `patch_norm` and
    `absolute_position` follow from names and shapes of tensors by the same rules in both families.

    Args:
        shapes: Shapes of the tensors, by our names.
    """
    width, _, _, patch = shapes["patch_embed.proj.weight"]
    stages = range(count_of(shapes, r"layers\.(\d+)\."))
    return {
        "embed_dim": width,
        "depths": tuple(count_of(shapes, rf"layers\.{s}\.blocks\.(\d+)\.") for s in stages),
        "patch_size": patch,
        "mlp_ratio": mlp_ratio(shapes, "layers.0.blocks.0.mlp.fc1.weight", width),
        "qkv_bias": qkv_bias(shapes, "layers.0.blocks.0.attn."),
        "patch_norm": "patch_embed.norm.weight" in shapes,
        "absolute_position": "absolute_pos_embed" in shapes,
    }


def window_and_size(
    fields: dict[str, Any], windows: list[int], side: int, shapes: Shapes
) -> dict[str, Any]:
    """Returns the fields `window_size` (tokens) and `image_size` (pixels) that tensors show.

    The image size is the size for which windows and positions were made. A field that no tensor
    shows is left out.

    Args:
        fields: Result of `recognised`.
        windows: Side of the windows in each stage, in tokens; 0 if no tensor shows it.
        side: Number of patches along a side of the image; 0 if no tensor shows it.
        shapes: Shapes of the tensors, by our names.
    """
    sizes: dict[str, Any] = {}
    window = max(windows, default=0)
    if window:
        sizes["window_size"] = window
        smaller = [w * 2**s for s, w in enumerate(windows) if 0 < w < window]
        # Without a smaller one, the smallest map on which every stage has a full window.
        side = side or (smaller[0] if smaller else window * 2 ** (len(windows) - 1))
    if fields["absolute_position"]:
        side = side_of(shapes["absolute_pos_embed"][1]) or side
    if side:
        sizes["image_size"] = side * fields["patch_size"]
    return sizes


def hugging_face_fields(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Returns {field: value} of the architecture fields that transformers' config.json states.

    The fields are `norm_eps`, `image_size` (pixels) and `window_size` (tokens). A value is None if
    the configuration lacks it.

    Args:
        config: Contents of the config.json of a Swin or SwinV2; it always has `window_size`.
        where: Field that the user set, for the message.

    Raises: WeightsError: for an unsupported activation.
    """
    activation_named(config.get("hidden_act"), where, of="hidden_act")
    return {
        "norm_eps": config.get("layer_norm_eps"),
        "image_size": config.get("image_size"),
        "window_size": config["window_size"],
    }


def timm_fields(net: Any) -> dict[str, Any]:
    """Returns {field: value} of the architecture fields of `net`, timm's Swin or SwinV2 module.

    The fields are `norm_eps`, `image_size` (pixels) and `window_size` (tokens).
    """
    blocks = [stage.blocks[0] for stage in net.layers]
    return {
        "window_size": max(block.window_size[0] for block in blocks),
        "image_size": net.patch_embed.img_size[0],
        "norm_eps": blocks[0].norm1.eps,
    }

"""What the published files of both Swin models have in common."""

from __future__ import annotations

import re
from typing import Any

from fd_large.backbones.published import Names, Wanted, any_has
from fd_large.backbones.recognition import activation_named, count_of, mlp_ratio, qkv_bias, side_of
from fd_large.backbones.translation import (
    RECOMPUTED,
    Pieces,
    Shapes,
    Target,
    fresh_norm,
    replaced,
)

_HUGGING_FACE = (
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("embeddings.norm.", "patch_embed.norm."),
    ("embeddings.position_embeddings", "absolute_pos_embed"),
    ("encoder.layers.", "layers."),
    (".attention.self.continuous_position_bias_mlp.", ".attn.cpb_mlp."),
    (".attention.self.", ".attn."),
    (".attention.output.dense.", ".attn.proj."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
)
_THIRDS = {"query": 0, "key": 1, "value": 2}


def _has_first(fact: tuple[int, ...], wanted: tuple[int, ...], depths: tuple[int, ...]) -> bool:
    return tuple(fact[: len(wanted)]) == tuple(wanted)


FREE = frozenset({"image_size", "window_size"})
# A model may have the first stages alone.
AGREE = {"depths": _has_first, "num_heads": _has_first}


def official(name: str) -> Target | None:
    """Swin-Transformer, EsViT and our own files: the names are ours; heads are dropped."""
    if name.endswith(RECOMPUTED) or name.startswith(("head.", "head_dense.")):
        return None
    return Target(name)


def simmim(name: str) -> Target | None:
    """SimMIM: the encoder is official; mask token and decoder are dropped."""
    name = name.removeprefix("encoder.")
    if name == "mask_token" or name.startswith("decoder."):
        return None
    return official(name)


def timm(name: str) -> Target | None:
    """Merging opens a stage there and closes the one before here; otherwise the official names."""
    number = re.match(r"layers\.(\d+)\.downsample\.", name)
    if number:
        name = f"layers.{int(number[1]) - 1}.downsample.{name[number.end() :]}"
    return None if name.endswith(".k_bias") else official(name)


_MMSEG = (
    ("patch_embed.projection.", "patch_embed.proj."),
    (".attn.w_msa.", ".attn."),
    (".ffn.layers.0.0.", ".mlp.fc1."),
    (".ffn.layers.1.", ".mlp.fc2."),
)


def mmseg(name: str) -> Target | None:
    """mmsegmentation's own Swin, which merges patches by nn.Unfold."""
    target = official(replaced(re.sub(r"^stages\.", "layers.", name), _MMSEG))
    return target and target._replace(form="unfolded" if ".downsample." in name else "")


def hugging_face(name: str, *, fused_bias: bool) -> Target | None:
    """Hugging Face's Swin models; separate queries, keys and values become one tensor.

    Args:
        name: The file's.
        fused_bias: Whether the three biases become one vector; otherwise query and value have one.
    """
    name = name.removeprefix("swinv2.").removeprefix("swin.")
    if name.endswith(RECOMPUTED) or name.startswith(("classifier.", "pooler.", "decoder.")):
        return None
    if name == "embeddings.mask_token":
        return None
    if name.startswith("layernorm."):
        return Target(name.replace("layernorm.", "norm."))
    name = replaced(name, _HUGGING_FACE)
    part = re.fullmatch(r"(.*\.attn\.)(query|key|value)\.(weight|bias)", name)
    if part is None:
        return Target(name)
    if part[3] == "bias" and not fused_bias:
        return Target(f"{part[1]}{part[2][0]}_bias")
    return Target(f"{part[1]}qkv.{part[3]}", _THIRDS[part[2]])


def is_timm(names: Names) -> bool:
    """Whether a Swin is timm's, which merges at the start of a stage: the first has no merging."""
    return any_has(names, "layers.1.downsample.") and not any_has(names, "layers.0.downsample.")


def first_stages(pieces: Pieces, wanted: Wanted) -> tuple[Pieces, list[str]]:
    """Keeps as many stages as the model has, with a final norm that only normalises if fewer.

    FD's stage-3 target: the file's last merging and final norm belong to a wider map and are left
    out; the norm of the shorter model has weight 1 and bias 0.
    """
    depths = wanted.found.depths or ()
    stages = len(wanted.architecture.depths)
    if stages >= len(depths):
        return pieces, []
    kept = {}
    for name, piece in pieces.items():
        stage = re.match(r"layers\.(\d+)\.", name)
        beyond = stage and int(stage[1]) >= stages
        if not (beyond or name.startswith((f"layers.{stages - 1}.downsample.", "norm."))):
            kept[name] = piece
    return kept | fresh_norm(wanted.architecture.width), [
        f"the first {stages} of {len(depths)} stages, and a final norm that only normalises"
    ]


def recognised(shapes: Shapes) -> dict[str, Any]:
    """Returns the fields that tensors show in the same way for both models."""
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
    """Returns the window, and the image size that it and the positions are for.

    Args:
        fields: See `recognised`.
        windows: Side of the windows in each stage, in tokens; 0 where nothing shows it.
        side: Patches along a side of the image; 0 if nothing shows it.
        shapes: Shapes in our names.
    """
    found: dict[str, Any] = {}
    window = max(windows, default=0)
    if window:
        found["window_size"] = window
        smaller = [w * 2**s for s, w in enumerate(windows) if 0 < w < window]
        # Without a smaller one, the smallest map on which every stage has a full window.
        side = side or (smaller[0] if smaller else window * 2 ** (len(windows) - 1))
    if fields["absolute_position"]:
        side = side_of(shapes["absolute_pos_embed"][1]) or side
    if side:
        found["image_size"] = side * fields["patch_size"]
    return found


def hugging_face_fields(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Reads what a `config.json` of transformers states about both models."""
    activation_named(config.get("hidden_act"), where, of="hidden_act")
    return {
        "norm_eps": config.get("layer_norm_eps"),
        "image_size": config.get("image_size"),
        "window_size": config["window_size"],
    }


def timm_fields(net: Any) -> dict[str, Any]:
    """Reads what a Swin of timm, a module, shows of both models."""
    blocks = [stage.blocks[0] for stage in net.layers]
    return {
        "window_size": max(block.window_size[0] for block in blocks),
        "image_size": net.patch_embed.img_size[0],
        "norm_eps": blocks[0].norm1.eps,
    }

"""Published names of Swin and SwinV2 weights, mapped to ours: pure functions on names."""

from __future__ import annotations

import re

from fd_large.weights.translation import Piece, Shape, Target, replaced

# Tables that a model computes for itself.
RECOMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")

_FD = (
    (".rel_pos_bias.", ".position_bias."),
    (".rpe_mlp.", ".cpb_mlp."),
    (".enorm.", ".extra_norm."),
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


def official(name: str) -> Target | None:
    """Swin-Transformer, EsViT and our own files: the names are ours; heads are dropped."""
    if name.endswith(RECOMPUTED) or name.startswith(("head.", "head_dense.")):
        return None
    return Target(name)


def timm(name: str) -> Target | None:
    """Merging opens a stage there and closes the one before here; otherwise the official names."""
    number = re.match(r"layers\.(\d+)\.downsample\.", name)
    if number:
        name = f"layers.{int(number[1]) - 1}.downsample.{name[number.end() :]}"
    return None if name.endswith(".k_bias") else official(name)


def fd(name: str) -> Target | None:
    """Feature-Distillation repository: the student and its projection."""
    if name.startswith("decoder.0."):
        return projection(name)
    if name.startswith("feature_model."):
        return None
    target = official(name.removeprefix("encoder."))
    return target and Target(replaced(target.name, _FD))


def simmim(name: str) -> Target | None:
    """SimMIM in the Swin-Transformer repository: mask token and decoder are dropped."""
    name = name.removeprefix("encoder.")
    if name == "mask_token" or name.startswith("decoder."):
        return None
    return fd(name)


def hugging_face(name: str, *, version: int) -> Target | None:
    """Hugging Face's Swin and Swin V2; separate queries, keys and values become one tensor."""
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
    if part[3] == "bias" and version == 2:
        return Target(f"{part[1]}{part[2][0]}_bias")  # No bias of the key.
    return Target(f"{part[1]}qkv.{part[3]}", _THIRDS[part[2]])


def projection(name: str) -> Target:
    """The 1x1 convolution to the teacher's width, (Ct, Cs, 1), as a linear layer's (Ct, Cs)."""
    return Target(f"projection.{name.removeprefix('decoder.0.')}", form="matrix")


def first_stages(pieces: dict[str, Piece], stages: int, width: int) -> dict[str, Piece]:
    """Keeps the first stages of a Swin model, with a final norm that only normalises.

    FD's stage-3 target: the file's last merging and final norm belong to a wider map and are left
    out; the norm of the shorter model has weight 1 and bias 0.

    Args:
        pieces: In our names.
        stages: How many to keep.
        width: Channels of the last one kept.
    """
    kept = {}
    for name, piece in pieces.items():
        stage = re.match(r"layers\.(\d+)\.", name)
        beyond = stage and int(stage[1]) >= stages
        if not (beyond or name.startswith((f"layers.{stages - 1}.downsample.", "norm."))):
            kept[name] = piece
    return kept | fresh_norm(width)


def fresh_norm(width: int) -> dict[str, Piece]:
    """A final norm that only normalises: weight 1, bias 0."""
    return {
        "norm.weight": Piece((), value=1.0, length=width),
        "norm.bias": Piece((), value=0.0, length=width),
    }


def expand_shared_bias(pieces: dict[str, Piece], shapes: dict[str, Shape]) -> dict[str, Piece]:
    """Gives every block its own copy of a position bias that a file shares (FD's fine-tuning).

    Args:
        pieces: In our names, of a SwinV2 or a ViT.
        shapes: Of the model that is to be filled, whose blocks own their bias.
    """
    copies = {}
    for name in shapes:
        shared = re.sub(r"blocks\.\d+\.attn\.cpb_mlp\.", "position_bias.cpb_mlp.", name)
        shared = re.sub(r"^blocks\.\d+\.attn\.(?=relative_position)", "rel_pos_bias.", shared)
        if name not in pieces and shared != name and shared in pieces:
            copies[name] = pieces[shared]
    if not copies:
        return pieces
    own = {n: p for n, p in pieces.items() if "position_bias.cpb_mlp." not in n}
    return {n: p for n, p in own.items() if not n.startswith("rel_pos_bias.")} | copies

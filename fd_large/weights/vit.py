"""Published names of ViT weights, mapped to ours: pure functions on (name, tensor)."""

from __future__ import annotations

from torch import Tensor

from fd_large.weights.swin import RECOMPUTED, Item, projection

_CLIP_NAMES = {
    "visual.class_embedding": "cls_token",
    "visual.positional_embedding": "pos_embed",
    "visual.conv1.weight": "patch_embed.proj.weight",
}
_CLIP_PARTS = (
    ("visual.ln_pre.", "norm_pre."),
    ("visual.ln_post.", "norm."),
    ("visual.transformer.resblocks.", "blocks."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".attn.in_proj_weight", ".attn.qkv.weight"),
    (".attn.in_proj_bias", ".attn.qkv.bias"),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
)


def openai_clip(name: str, tensor: Tensor) -> Item | None:
    """OpenAI CLIP's image tower; the text tower and the projection to it are dropped."""
    if not name.startswith("visual.") or name == "visual.proj":
        return None
    if name in _CLIP_NAMES:
        if name == "visual.class_embedding":
            tensor = tensor.view(1, 1, -1)
        elif name == "visual.positional_embedding":
            tensor = tensor[None]
        return _CLIP_NAMES[name], tensor
    for theirs, ours in _CLIP_PARTS:
        name = name.replace(theirs, ours)
    return name, tensor


def plain_vit(name: str, tensor: Tensor) -> Item | None:
    """DINO, DeiT and timm share our names; their heads are dropped."""
    if name.startswith(("head.", "head_dist.")):
        return None
    return name, tensor


def fd_vit(name: str, tensor: Tensor) -> Item | None:
    """Feature-Distillation repository: student, projection; the teacher in the file is dropped."""
    if name.startswith("decoder.0."):
        return projection(name.removeprefix("decoder.0."), tensor)
    if name.startswith("feature_model.") or name.endswith(RECOMPUTED):
        return None
    name = name.removeprefix("encoder.")
    return None if name.startswith("head.") else (name, tensor)

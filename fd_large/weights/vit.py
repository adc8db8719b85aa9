"""Published names of ViT weights, mapped to ours: pure functions on names."""

from __future__ import annotations

import re

from fd_large.weights.swin import RECOMPUTED, projection
from fd_large.weights.translation import Target, replaced

_CLIP_PARTS = (
    ("ln_pre.", "norm_pre."),
    ("ln_post.", "norm."),
    ("transformer.resblocks.", "blocks."),
    (".ln_1.", ".norm1."),
    (".ln_2.", ".norm2."),
    (".attn.in_proj_weight", ".attn.qkv.weight"),
    (".attn.in_proj_bias", ".attn.qkv.bias"),
    (".attn.out_proj.", ".attn.proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    (".ls_1.gamma", ".gamma_1"),
    (".ls_2.gamma", ".gamma_2"),
    ("conv1.weight", "patch_embed.proj.weight"),
)
_HF_CLIP_PARTS = (
    ("embeddings.patch_embedding.", "patch_embed.proj."),
    ("pre_layrnorm.", "norm_pre."),
    ("post_layernorm.", "norm."),
    ("encoder.layers.", "blocks."),
    (".layer_norm1.", ".norm1."),
    (".layer_norm2.", ".norm2."),
    (".self_attn.", ".attn."),
    (".out_proj.", ".proj."),
)
# Names that transformers stored up to version 4 and stores still; then those of 5 in memory.
_HF_VIT_PARTS = (
    ("embeddings.cls_token", "cls_token"),
    ("embeddings.distillation_token", "dist_token"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.patch_embeddings.projection.", "patch_embed.proj."),
    ("encoder.layer.", "blocks."),
    ("layers.", "blocks."),
    (".attention.attention.query.", ".attn.q_proj."),
    (".attention.attention.key.", ".attn.k_proj."),
    (".attention.attention.value.", ".attn.v_proj."),
    (".attention.output.dense.", ".attn.proj."),
    (".attention.o_proj.", ".attn.proj."),
    (".attention.", ".attn."),
    (".intermediate.dense.", ".mlp.fc1."),
    (".output.dense.", ".mlp.fc2."),
    (".layernorm_before.", ".norm1."),
    (".layernorm_after.", ".norm2."),
)
# Before those of the ViT.
_HF_BEIT_PARTS = (
    ("encoder.relative_position_bias.", "rel_pos_bias."),
    ("shared_position_bias.", "rel_pos_bias."),
    (".attention.attention.relative_position_bias.", ".attn."),
    (".relative_position_bias.", ".attn."),
    (".lambda_", ".gamma_"),
)
_THIRDS = {"q": 0, "k": 1, "v": 2}
_LAYER_SCALE = ((".ls1.gamma", ".gamma_1"), (".ls2.gamma", ".gamma_2"))


def clip(name: str) -> Target | None:
    """OpenAI's and open_clip's image tower; the text tower and the projection are dropped."""
    if not name.startswith("visual.") or name == "visual.proj":
        return None
    name = name.removeprefix("visual.")
    if name == "class_embedding":
        return Target("cls_token", form="token")
    if name == "positional_embedding":
        return Target("pos_embed", form="batched")
    return Target(replaced(name, _CLIP_PARTS))


def open_clip_trunk(name: str) -> Target | None:
    """An image tower that open_clip took from timm."""
    if not name.startswith("visual.trunk."):
        return None
    return plain(name.removeprefix("visual.trunk."))


def hugging_face_clip(name: str) -> Target | None:
    """Hugging Face's CLIP, whole or the image tower alone."""
    if name.startswith(("text_model.", "text_projection.", "visual_projection.", "logit_scale")):
        return None
    name = name.removeprefix("vision_model.")
    if name.endswith("position_ids") or name.startswith("classifier."):
        return None
    if name == "embeddings.class_embedding":
        return Target("cls_token", form="token")
    if name == "embeddings.position_embedding.weight":
        return Target("pos_embed", form="batched")
    return _fused(replaced(name, _HF_CLIP_PARTS))


def hugging_face_vit(name: str) -> Target | None:
    """Hugging Face's ViT and DeiT."""
    name = name.removeprefix("vit.").removeprefix("deit.")
    heads = ("classifier.", "cls_classifier.", "distillation_classifier.", "pooler.", "decoder.")
    if name.startswith(heads) or name == "embeddings.mask_token":
        return None
    if name.startswith("layernorm."):
        return Target(name.replace("layernorm.", "norm."))
    return _fused(replaced(name, _HF_VIT_PARTS))


def hugging_face_beit(name: str) -> Target | None:
    """Hugging Face's BEiT; a norm for the mean of the tokens is its pooler's, and dropped."""
    name = name.removeprefix("beit.")
    if name.startswith("lm_head.") or name.endswith(RECOMPUTED):
        return None
    target = hugging_face_vit(replaced(name, _HF_BEIT_PARTS))
    if target and (bias := re.fullmatch(r"(.*\.attn\.)qkv\.bias", target.name)):
        return Target(f"{bias[1]}{'qkv'[target.third]}_bias")
    return target


def plain(name: str) -> Target | None:
    """DINO, DeiT and timm share our names; their heads are dropped, also one's own norm."""
    if name.startswith(("head.", "head_dist.", "fc_norm.")):
        return None
    return Target(replaced(name, _LAYER_SCALE))


def fd(name: str) -> Target | None:
    """Feature-Distillation repository and BEiT: heads are dropped, the projection is kept."""
    if name.startswith("decoder.0."):
        return projection(name)
    name = name.removeprefix("encoder.")
    if name.endswith(RECOMPUTED) or name == "mask_token":
        return None
    if name.startswith(("feature_model.", "head.", "fc_norm.", "lm_head.")):
        return None
    return Target(name)


def _fused(name: str) -> Target:
    part = re.fullmatch(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)", name)
    return Target(f"{part[1]}qkv.{part[3]}", _THIRDS[part[2]]) if part else Target(name)

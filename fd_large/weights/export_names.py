"""Our tensors in the names and shapes of timm, of Hugging Face and of Feature-Distillation.

Made from names and shapes alone, so that a file's header is known before a tensor is read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from fd_large.recipes.family import Transformer
from fd_large.weights.translation import Shape, replaced
from fd_large.weights.write import timm_name

PROJECTION = "projection."
_SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
_FEATURE_DISTILLATION = ((".position_bias.", ".rel_pos_bias."), (".cpb_mlp.", ".rpe_mlp."))
_HUGGING_FACE = (
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    (".attn.proj.", ".attention.output.dense."),
    (".attn.q_bias", ".attn.query.bias"),
    (".attn.v_bias", ".attn.value.bias"),
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
)
_HUGGING_FACE_SWIN = (
    ("patch_embed.norm.", "embeddings.norm."),
    ("layers.", "encoder.layers."),
    (".cpb_mlp.", ".continuous_position_bias_mlp."),
    (".attn.", ".attention.self."),
)
_HUGGING_FACE_VIT = (
    ("cls_token", "embeddings.cls_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("rel_pos_bias.", "encoder.relative_position_bias."),
    ("blocks.", "encoder.layer."),
    (".attn.relative", ".attn.relative_position_bias.relative"),
    (".attn.", ".attention.attention."),
    (".gamma_", ".lambda_"),
)


class Output(NamedTuple):
    """A tensor of an exported file.

    Attributes:
        name: Theirs.
        shape: Theirs.
        take: Makes it from ours.
    """

    name: str
    shape: Shape
    take: Callable[[Tensor], Tensor]


def outputs(name: str, shape: Shape, architecture: Transformer, to: str) -> list[Output]:
    """Returns what becomes of one of our tensors, mostly one of theirs.

    Args:
        name: Ours, of a student or, under PROJECTION, of its projection.
        shape: Ours.
        architecture: Of the student.
        to: "timm", "hf" or "fd".
    """
    if to == "fd":
        return _feature_distillation(name, shape, architecture)
    if to == "hf":
        return _hugging_face(name, shape, architecture.family)
    if name == _SHARED_TABLE:  # timm's beit_* models have a table in every block.
        (depth,) = architecture.depths
        return [_same(f"blocks.{i}.attn.relative_position_bias_table", shape) for i in range(depth)]
    return [_same(timm_name(name, architecture), shape)]


def in_official_names(architecture: Transformer) -> bool:
    """Whether a model goes out in Swin-Transformer's names: one that Feature-Distillation has not."""
    return architecture.family == "swin" or has_extra_norms(architecture)


def has_extra_norms(architecture: Transformer) -> bool:
    """Whether any block ends with a norm on the main path."""
    return getattr(architecture, "has_extra_norms", False)


def _same(name: str, shape: Shape) -> Output:
    return Output(name, shape, lambda tensor: tensor)


def _feature_distillation(name: str, shape: Shape, architecture: Transformer) -> list[Output]:
    if in_official_names(architecture):
        return [_same(name, shape)]
    if name.startswith(PROJECTION):
        name = f"decoder.0.{name.removeprefix(PROJECTION)}"
        if len(shape) == 2:  # A convolution of side 1.
            return [Output(name, (*shape, 1), lambda tensor: tensor.unsqueeze(-1))]
        return [_same(name, shape)]
    return [_same(f"encoder.{replaced(name, _FEATURE_DISTILLATION)}", shape)]


def _hugging_face(name: str, shape: Shape, family: str) -> list[Output]:
    if name.startswith("norm."):
        return [_same(f"layernorm.{name.removeprefix('norm.')}", shape)]
    own = _HUGGING_FACE_VIT if family == "vit" else _HUGGING_FACE_SWIN
    name = replaced(replaced(name, _HUGGING_FACE), own)
    fused = re.fullmatch(r"(.*)\.qkv\.(weight|bias)", name)
    if fused is None:
        return [_same(name, shape)]
    rows, third = shape[0] // 3, (shape[0] // 3, *shape[1:])

    def part(which: int) -> Callable[[Tensor], Tensor]:
        return lambda tensor: tensor[which * rows : (which + 1) * rows]

    return [
        Output(f"{fused[1]}.{letter}.{fused[2]}", third, part(i))
        for i, letter in enumerate(("query", "key", "value"))
    ]

"""Published names of Swin and SwinV2 weights, mapped to ours: pure functions on (name, tensor)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

# Tables that a net computes for itself.
RECOMPUTED = ("relative_position_index", "relative_coords_table", "attn_mask")

Item = tuple[str, Tensor]


def official_swinv2(name: str, tensor: Tensor) -> Item | None:
    """Swin-Transformer repository (and our own files): the names are ours; the head is dropped."""
    if name.endswith(RECOMPUTED) or name.startswith("head."):
        return None
    return name, tensor


def fd_swinv2(name: str, tensor: Tensor) -> Item | None:
    """Feature-Distillation repository: student, projection; the teacher in the file is dropped."""
    if name.startswith("decoder.0."):
        return projection(name.removeprefix("decoder.0."), tensor)
    if name.startswith("feature_model.") or name.endswith(RECOMPUTED):
        return None
    name = name.removeprefix("encoder.")
    if name.startswith("head."):
        return None
    name = name.replace(".rel_pos_bias.", ".position_bias.").replace(".rpe_mlp.", ".cpb_mlp.")
    return name.replace(".enorm.", ".extra_norm."), tensor


def swin_v1(name: str, tensor: Tensor) -> Item | None:
    """Swin-Transformer's and EsViT's first version: the names are ours; heads are dropped."""
    if name.endswith(RECOMPUTED) or name.startswith(("head.", "head_dense.")):
        return None
    return name, tensor


def projection(name: str, tensor: Tensor) -> Item:
    """The 1x1 convolution to the teacher's width, (Ct, Cs, 1), as a linear layer's (Ct, Cs)."""
    if name == "weight" and tensor.dim() == 3:
        tensor = tensor[:, :, 0]
    return f"projection.{name}", tensor


def first_stages(items: Iterable[Item], stages: int) -> Iterator[Item]:
    """Keeps the first stages of a Swin net, with a final norm that only normalises.

    FD's stage-3 target: the file's last merging and final norm belong to a wider map and are left
    out; the norm of the shorter net has weight 1 and bias 0.

    Args:
        items: In our names.
        stages: How many to keep.
    """
    width = 0
    for name, tensor in items:
        match = re.match(r"layers\.(\d+)\.", name)
        if match:
            stage = int(match[1])
            if stage >= stages or name.startswith(f"layers.{stages - 1}.downsample."):
                continue
            if name == f"layers.{stages - 1}.blocks.0.norm1.weight":
                width = tensor.shape[0]
        elif name in ("norm.weight", "norm.bias"):
            continue
        yield name, tensor
    if width:
        yield "norm.weight", torch.ones(width)
        yield "norm.bias", torch.zeros(width)

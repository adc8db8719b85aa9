"""Parameters of a model, from its architecture alone: the shape of every tensor.

Names are those of `fd_large.backbones` (the official repositories'), so that a built model can be
held against this table name by name.

Per SwinV2 block of width c with h heads: 12c^2 + 12c + 1536 + 513h (the last two: the position-bias
MLP 2 -> 512 -> h and one logit scale a head); merging 8c^2 + 4c; stem 51C; final norm 16C for four
stages; an extra norm 2c.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from fd_large.backbones.swinv2.architecture import SwinV2Architecture
from fd_large.backbones.timm.architecture import TimmArchitecture
from fd_large.backbones.vit.architecture import ViTArchitecture
from fd_large.errors import ConfigError
from fd_large.recipes.family import FamilyArchitecture, Transformer, WindowedTransformer

Shapes = dict[str, tuple[int, ...]]

# Hidden width of SwinV2's position-bias MLP (official code).
POSITION_BIAS_WIDTH = 512
# Relations of CLS in a ViT's table: CLS to any token, any token to CLS, CLS to itself.
CLASS_TOKEN_ROWS = 3


@dataclass(frozen=True, kw_only=True)
class TimmCounts:
    """What was counted on the built part of a model of timm, up to a stride.

    Attributes:
        width: Channels of the map.
        parameters: Elements of all tensors.
        macs_per_pixel: Multiply-adds of a forward over the image's pixels; a convolutional model
            has the same number at every size that its stride divides.
    """

    width: int
    parameters: int
    macs_per_pixel: int


TIMM = {
    ("tf_efficientnet_lite0", 8): TimmCounts(width=40, parameters=55_504, macs_per_pixel=2267),
    ("resnet50", 32): TimmCounts(width=2048, parameters=23_508_032, macs_per_pixel=81_456),
}


def shapes(architecture: FamilyArchitecture, *, image_size: int = 0) -> Shapes:
    """Returns {parameter name: shape} of a model, in no promised order.

    Args:
        architecture: A vision transformer's.
        image_size: Side in pixels of the images, on which position tables (and the windows of
            Swin V1) depend; 0: the architecture's own.

    Raises: ConfigError: for other models, whose shapes are known only where they are built.
    """
    if not isinstance(architecture, Transformer):
        raise ConfigError(
            f"plan: the tensors of this model are not in the table; got {_called(architecture)}, "
            "expected a model of swinv2, swin or vit. Count the parameters of the built model "
            "instead."
        )
    side = (image_size or architecture.image_size) // architecture.patch_size
    if isinstance(architecture, ViTArchitecture):
        return _vit(architecture, side)
    return _swin(architecture, side)


def width(architecture: FamilyArchitecture) -> int:
    """Returns the channels of the feature map.

    Raises: ConfigError: for a model of timm that `TIMM` does not list, and for one's own.
    """
    if isinstance(architecture, Transformer):
        return architecture.width
    return timm_counts(architecture).width


def timm_counts(architecture: FamilyArchitecture) -> TimmCounts:
    """Returns the counts of a model of timm.

    Raises: ConfigError: if `TIMM` does not list the model at that stride, or it is one's own.
    """
    counts = None
    if isinstance(architecture, TimmArchitecture):
        counts = TIMM.get((architecture.timm_name, architecture.feature_stride))
    if counts is None:
        known = ", ".join(f"{name} at stride {stride}" for name, stride in TIMM)
        raise ConfigError(
            "plan: this model can be counted only where it is built; got "
            f"{_called(architecture)}, expected a model of swinv2, swin, vit, or of timm {known}. "
            "Plan with the one that is nearest in size."
        )
    return counts


def projection_shapes(student_width: int, teacher_width: int) -> Shapes:
    """Returns the shapes of the 1x1 projection from the student's width to the teacher's."""
    return {"weight": (teacher_width, student_width), "bias": (teacher_width,)}


def sizes(tables: Shapes | Iterable[Shapes]) -> list[int]:
    """Returns the elements of each tensor of one table or several."""
    tables = [tables] if isinstance(tables, dict) else tables
    return [math.prod(shape) for table in tables for shape in table.values()]


def count(table: Shapes) -> int:
    """Returns the number of parameters."""
    return sum(sizes(table))


def _called(architecture: FamilyArchitecture) -> str:
    return next((str(v) for v in asdict(architecture).values()), architecture.family)


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def _linear(name: str, inputs: int, outputs: int, *, bias: bool = True) -> Shapes:
    table: Shapes = {f"{name}.weight": (outputs, inputs)}
    return table | ({f"{name}.bias": (outputs,)} if bias else {})


def _attention(name: str, c: int, qkv_bias: str | None) -> Shapes:
    table = _linear(f"{name}.qkv", c, 3 * c, bias=qkv_bias == "fused")
    biases = {"qv": ("q", "v"), "qkv": ("q", "k", "v")}.get(qkv_bias or "none", ())
    return (
        table | {f"{name}.{letter}_bias": (c,) for letter in biases} | _linear(f"{name}.proj", c, c)
    )


def _mlp(name: str, c: int, ratio: float) -> Shapes:
    hidden = int(c * ratio)
    return _linear(f"{name}.fc1", c, hidden) | _linear(f"{name}.fc2", hidden, c)


def _position_bias(name: str, heads: int) -> Shapes:
    return _linear(f"{name}.0", 2, POSITION_BIAS_WIDTH) | _linear(
        f"{name}.2", POSITION_BIAS_WIDTH, heads, bias=False
    )


def _swin(a: WindowedTransformer, side: int) -> Shapes:
    table: Shapes = {
        "patch_embed.proj.weight": (a.embed_dim, 3, a.patch_size, a.patch_size),
        "patch_embed.proj.bias": (a.embed_dim,),
    }
    if a.patch_norm:
        table |= _norm("patch_embed.norm", a.embed_dim)
    if a.absolute_position:
        table["absolute_pos_embed"] = (1, side * side, a.embed_dim)
    stages, v2 = len(a.depths), isinstance(a, SwinV2Architecture)
    for stage, (depth, heads) in enumerate(zip(a.depths, a.num_heads, strict=True)):
        c, layer = a.embed_dim * 2**stage, f"layers.{stage}"
        window = min(a.window_size, side // 2**stage)
        if isinstance(a, SwinV2Architecture) and a.shared_position_bias:
            table |= _position_bias(f"{layer}.position_bias.cpb_mlp", heads)
        for index in range(depth):
            block = f"{layer}.blocks.{index}"
            table |= _attention(f"{block}.attn", c, a.qkv_bias)
            if isinstance(a, SwinV2Architecture):
                table[f"{block}.attn.logit_scale"] = (heads, 1, 1)
                if not a.shared_position_bias:
                    table |= _position_bias(f"{block}.attn.cpb_mlp", heads)
                if a.extra_norm_every and (index + 1) % a.extra_norm_every == 0:
                    table |= _norm(f"{block}.extra_norm", c)
            else:
                table[f"{block}.attn.relative_position_bias_table"] = (
                    (2 * window - 1) ** 2,
                    heads,
                )
            table |= _norm(f"{block}.norm1", c) | _norm(f"{block}.norm2", c)
            table |= _mlp(f"{block}.mlp", c, a.mlp_ratio)
        if stage < stages - 1:
            table |= _linear(f"{layer}.downsample.reduction", 4 * c, 2 * c, bias=False)
            # SwinV2 normalises after the reduction, Swin V1 before it.
            table |= _norm(f"{layer}.downsample.norm", (2 if v2 else 4) * c)
    return table | _norm("norm", width(a))


def _vit(a: ViTArchitecture, side: int) -> Shapes:
    c, (depth,), (heads,) = a.embed_dim, a.depths, a.num_heads
    table: Shapes = {"patch_embed.proj.weight": (c, 3, a.patch_size, a.patch_size)}
    if a.patch_bias:
        table["patch_embed.proj.bias"] = (c,)
    if a.class_token:
        table["cls_token"] = (1, 1, c)
    if a.distillation_token:
        table["dist_token"] = (1, 1, c)
    if a.absolute_position:
        tokens = side * side + bool(a.class_token) + bool(a.distillation_token)
        table["pos_embed"] = (1, tokens, c)
    if a.pre_norm_layer:
        table |= _norm("norm_pre", c)
    rows = (2 * side - 1) ** 2 + (CLASS_TOKEN_ROWS if a.class_token else 0)
    if a.relative_position == "shared":
        table["rel_pos_bias.relative_position_bias_table"] = (rows, heads)
    for index in range(depth):
        block = f"blocks.{index}"
        table |= _norm(f"{block}.norm1", c) | _norm(f"{block}.norm2", c)
        table |= _attention(f"{block}.attn", c, a.qkv_bias)
        if a.relative_position == "block":
            table[f"{block}.attn.relative_position_bias_table"] = (rows, heads)
        if a.layer_scale:
            table |= {f"{block}.gamma_1": (c,), f"{block}.gamma_2": (c,)}
        table |= _mlp(f"{block}.mlp", c, a.mlp_ratio)
    return table | _norm("norm", c)

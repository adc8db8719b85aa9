"""The architecture that a file's tensors show: everything that names and shapes can tell.

What they cannot (heads of a ViT without tables, activation, eps, windows) stays None; see
`beside.py` for what else is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from fd_large.recipes.architectures import Architecture
from fd_large.weights.read import Tensors
from fd_large.weights.translation import Shape

Shapes = Mapping[str, Shape]

# Published models of these widths have so many heads, whoever trained them: a guess, for where no
# table, configuration or user tells.
KNOWN_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
_CLASS_TOKEN_ROWS = 3


def recognise(family: str, shapes: Shapes, file: Tensors) -> Architecture:
    """Returns what tensors tell of a model; None where they do not.

    Args:
        family: "vit", "swin" or "swinv2".
        shapes: In our names.
        file: As it is, for the tables that official files hold beside the parameters.
    """
    if "patch_embed.proj.weight" not in shapes:
        return Architecture(family=family)
    return _vit(shapes) if family == "vit" else _swin(family, shapes, file)


def _vit(shapes: Shapes) -> Architecture:
    width, _, _, patch = shapes["patch_embed.proj.weight"]
    tokens = [name in shapes for name in ("cls_token", "dist_token")]
    table = shapes.get("rel_pos_bias.relative_position_bias_table")
    own_table = shapes.get("blocks.0.attn.relative_position_bias_table")
    grid = 0
    if "pos_embed" in shapes:
        grid = _side(shapes["pos_embed"][1] - sum(tokens))
    elif table or own_table:
        grid = _grid((table or own_table)[0] - _CLASS_TOKEN_ROWS * tokens[0])
    heads = (table or own_table or (0, 0))[1]
    return Architecture(
        family="vit",
        embed_dim=width,
        depths=(_count(shapes, r"blocks\.(\d+)\."),),
        num_heads=(heads,) if heads else None,
        patch_size=patch,
        image_size=grid * patch or None,
        mlp_ratio=_ratio(shapes, "blocks.0.mlp.fc1.weight", width),
        qkv_bias=_qkv_bias(shapes, "blocks.0.attn."),
        patch_bias="patch_embed.proj.bias" in shapes,
        absolute_position="pos_embed" in shapes,
        class_token=tokens[0],
        distillation_token=tokens[1],
        relative_position="shared" if table else "block" if own_table else "none",
        layer_scale=0.0 if "blocks.0.gamma_1" not in shapes else 0.1,
        pre_norm_layer="norm_pre.weight" in shapes,
    )


def _swin(family: str, shapes: Shapes, file: Tensors) -> Architecture:
    width, _, _, patch = shapes["patch_embed.proj.weight"]
    stages = range(_count(shapes, r"layers\.(\d+)\."))
    depths = tuple(_count(shapes, rf"layers\.{s}\.blocks\.(\d+)\.") for s in stages)
    own = {
        "family": family,
        "embed_dim": width,
        "depths": depths,
        "patch_size": patch,
        "mlp_ratio": _ratio(shapes, "layers.0.blocks.0.mlp.fc1.weight", width),
        "qkv_bias": _qkv_bias(shapes, "layers.0.blocks.0.attn."),
        "patch_norm": "patch_embed.norm.weight" in shapes,
        "absolute_position": "absolute_pos_embed" in shapes,
    }
    if family == "swin":
        tables = [shapes.get(f"layers.{s}.blocks.0.attn.{_TABLE}", (0, 0)) for s in stages]
        windows, heads = [_grid(rows) for rows, _ in tables], [h for _, h in tables]
        side = 0
    else:
        scales = [shapes.get(f"layers.{s}.blocks.0.attn.logit_scale", (0,)) for s in stages]
        heads = [shape[0] for shape in scales]
        windows, pretrained, side = _windows(len(depths), file)
        if pretrained:
            own["pretrained_window_sizes"] = pretrained
        own["extra_norm_every"] = _extra_norms(shapes)
        own["shared_position_bias"] = any(".position_bias.cpb_mlp." in name for name in shapes)
    if all(heads):
        own["num_heads"] = tuple(heads)
    window = max(windows, default=0)
    if window:
        own["window_size"] = window
        smaller = [w * 2**s for s, w in enumerate(windows) if 0 < w < window]
        # Without a smaller one, the smallest map on which every stage has a full window.
        side = side or (smaller[0] if smaller else window * 2 ** (len(windows) - 1))
    if own["absolute_position"]:
        side = _side(shapes["absolute_pos_embed"][1]) or side
    if side:
        own["image_size"] = side * patch
    return Architecture(**own)


_TABLE = "relative_position_bias_table"


def _windows(stages: int, file: Tensors) -> tuple[list[int], tuple[int, ...], int]:
    """SwinV2's windows, pre-training windows and patches a side, from the tables of official files.

    A file without such tables gives zeros.
    """
    windows, pretrained, side = [0] * stages, [0] * stages, 0
    for name in file:
        stage = re.match(r"(?:encoder\.)?layers\.(\d+)\.", name)
        if stage is None or int(stage[1]) >= stages:
            continue
        s = int(stage[1])
        if name.endswith(".relative_coords_table") and not windows[s]:
            windows[s] = (file.shape(name)[-2] + 1) // 2
            pretrained[s] = _reference(file[name].max().item(), windows[s])
        elif name.endswith(".attn_mask") and not side:
            count, tokens, _ = file.shape(name)
            side = math.isqrt(count * tokens) * 2**s
    known = all(windows)
    return windows, tuple(pretrained) if known else (), side


def _reference(largest: float, window: int) -> int:
    """The w0 of a table whose largest entry is log2(8 (w - 1) / (w0 - 1) + 1) / 3."""
    if window < 2 or not math.isfinite(largest) or largest <= 0:
        return window
    return round(8 * (window - 1) / (2 ** (3 * largest) - 1)) + 1


def _extra_norms(shapes: Shapes) -> int:
    found = [re.match(r"layers\.\d+\.blocks\.(\d+)\.extra_norm\.weight", name) for name in shapes]
    return min((int(match[1]) + 1 for match in found if match), default=0)


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the largest number in names."""
    found = (re.match(pattern, name) for name in shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _ratio(shapes: Shapes, name: str, width: int) -> float | None:
    return shapes[name][0] / width if name in shapes else None


def _qkv_bias(shapes: Shapes, attention: str) -> str:
    if f"{attention}qkv.bias" in shapes:
        return "fused"
    if f"{attention}q_bias" in shapes:
        return "qkv" if f"{attention}k_bias" in shapes else "qv"
    return "none"


def _side(cells: int) -> int:
    """Side of a square grid of so many cells; 0: none."""
    side = math.isqrt(max(cells, 0))
    return side if side * side == cells else 0


def _grid(offsets: int) -> int:
    """Side n of a grid with (2n - 1)^2 offsets; 0: none."""
    return (_side(offsets) + 1) // 2 if _side(offsets) % 2 else 0

"""Launches of the kernels of `window_attention.py`, their gradients and their FLOPs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fd_large.kernels.operation import blocks, launch, operation
from fd_large.kernels.window_attention_geometry import Geometry

# Triton's interpreter multiplies bfloat16 incorrectly, and truncates where a GPU rounds.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@operation("window_attention")
def forward(
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    scale: Tensor,
    numbers: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The attention (B, N, C), and log2 of the softmax's sums (h, B, N) float32.

    The numbers are heads, rows and columns of the map, those of a window, shift, and whether q and
    k are normalised.
    """
    geometry = Geometry.of(qkv, *numbers)
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    lse = qkv.new_empty(geometry.num_heads, *qkv.shape[:2], dtype=torch.float32)
    programs = qkv.shape[0] * geometry.windows * geometry.num_heads * geometry.tiles
    launch(
        "window_attention_triton._forward", (programs,),
        qkv, bias, _in_bits(table), scale, out, lse, qkv.shape[0] * qkv.shape[1],
        geometry.height, geometry.width, geometry.num_heads,
        STEP=geometry.step, REST=geometry.rest, **_constants(geometry, qkv.dtype),
    )  # fmt: skip
    return out, lse


@operation("window_attention_backward")
def backward(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    scale: Tensor,
    out: Tensor,
    lse: Tensor,
    numbers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of qkv, bias, table and scale, the last three float32.

    The scale of a dot product is a constant.
    """
    geometry = Geometry.of(qkv, *numbers)
    heads, batch = geometry.num_heads, qkv.shape[0]
    chunks, groups = geometry.chunks(batch), geometry.groups(batch)
    shapes = geometry.partials(batch)
    dqkv = torch.empty_like(qkv)
    parts = None if table is None else lse.new_empty(shapes.table)
    dbias = None if bias is None else lse.new_empty(shapes.bias)
    dscale = lse.new_empty(shapes.scale) if geometry.cosine else None
    tables = 0 if table is None else groups * geometry.kinds
    slots = {"SLOTS": geometry.slots, "ROW": geometry.row}
    launch(
        "window_attention_backward_triton._backward",
        (heads * (tables + 2 * chunks * geometry.tiles),),
        qkv, bias, _in_bits(table), scale, out, dout, lse, dqkv, dbias, dscale, parts,
        batch * qkv.shape[1], geometry.height, geometry.width, heads, batch * geometry.windows,
        chunks, groups,
        STEP=16, **slots, **_constants(geometry, qkv.dtype),
    )  # fmt: skip
    dtable = lse.new_empty((0,) if table is None else table.shape)
    if table is not None:
        offsets = len(table) - 3 * geometry.prefix
        launch(
            "window_attention_table_triton.gather_table", (blocks(offsets, 64), heads),
            parts, dtable, heads, groups,
            PREFIX=geometry.prefix, WH=geometry.window[0], WW=geometry.window[1], BLOCK=64,
            **slots, num_warps=2,
        )  # fmt: skip
        if geometry.prefix:
            dtable[offsets:] = parts[:, :, -3:].flatten(3).sum((0, 3)).t()
    return (
        dqkv,
        lse.new_empty(0) if dbias is None else dbias.sum(0),
        dtable,
        lse.new_empty(0) if dscale is None else dscale.sum(1),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.numbers = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    _, bias, table, scale, _, _ = saved = ctx.saved_tensors
    dqkv, dbias, dtable, dscale = backward(dout.contiguous(), *saved, ctx.numbers)
    return (
        dqkv,
        None if bias is None else dbias.to(bias.dtype),
        None if table is None else dtable.to(table.dtype),
        dscale.to(scale.dtype) if ctx.numbers[-1] else None,
        None,
    )


forward.register_autograd(_differentiate, setup_context=_setup)


def _in_bits(table: Tensor | None) -> Tensor | None:
    """Returns the table head by head, in units of log 2, because the kernels use powers of 2."""
    if table is None:
        return None
    turned = table.new_empty(table.shape[::-1])
    return torch.mul(table.t(), math.log2(math.e), out=turned)


def _constants(geometry: Geometry, dtype: torch.dtype) -> dict[str, Any]:
    window = geometry.window
    # Enough warps to keep tiles in registers; a window without a table may be any row of tokens.
    wide, long = geometry.padded_width > 64, dtype == torch.float32
    warps = 16 if wide and long else 8 if wide or long or geometry.slots == 64 else 4
    return {
        "PREFIX": geometry.prefix,
        "WH": window[0],
        "WW": window[1],
        "SHIFT": geometry.shift,
        "PADDED": geometry.height % window[0] != 0 or geometry.width % window[1] != 0,
        "D": geometry.head_width,
        "BD": geometry.padded_width,
        "COSINE": geometry.cosine,
        "INTERPRETED": _INTERPRETED,
        "TILE": geometry.tile,
        "num_warps": warps,
        "num_stages": 1,
    }


def _product_flops(qkv: Any, window: tuple[int, int], height: int, width: int) -> int:
    """FLOPs of one of the products of attention: that of queries and keys, say."""
    batch, tokens, channels = qkv
    if window == (height, width):
        pairs = tokens * tokens
    else:
        rows, columns = -(-height // window[0]), -(-width // window[1])
        pairs = rows * columns * (window[0] * window[1]) ** 2
    return 2 * batch * pairs * (channels // 3)


@register_flop_formula(torch.ops.fd_large.window_attention)
def _forward_flops(
    qkv: Any, bias: Any, table: Any, scale: Any, numbers: Sequence[int], *_: Any, **__: Any
) -> int:
    _, height, width, *window = numbers[:5]
    return 2 * _product_flops(qkv, tuple(window), height, width)


@register_flop_formula(torch.ops.fd_large.window_attention_backward)
def _backward_flops(dout: Any, *arguments: Any, **named: Any) -> int:
    # Four products, and the logits made again.
    return 5 * _forward_flops(*arguments[:4], arguments[6]) // 2

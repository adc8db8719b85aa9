"""Triton kernels of `window_attention.py`: tokens are read and written in the image's layout.

The logits of a tile stay in registers, so there is no (N, N) map; logits, softmax and sums are
float32. This file has the forward kernel and the launches; what the kernels share is in
`window_attention_tiles_triton.py`, the backward in `window_attention_backward_triton.py` and
`window_attention_table_triton.py`.
"""

from __future__ import annotations

import math
import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fd_large.kernels.residual_norm_triton import on_device
from fd_large.kernels.window_attention_backward_triton import _backward
from fd_large.kernels.window_attention_geometry import Geometry
from fd_large.kernels.window_attention_table_triton import gather_table
from fd_large.kernels.window_attention_tiles_triton import (
    LOG2_E,
    add_bias,
    dot,
    load_bias,
    load_keys,
    load_queries,
    narrowed,
)

# Triton's interpreter multiplies bfloat16 incorrectly, and truncates where a GPU rounds.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _forward_keys(
    number, q, row_max, row_sum, out, QKV, TABLE, scale, number_i, offset_i, region_i, head, window,
    H, W, C,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Makes one step of the running softmax, over the keys with these numbers."""
    _, inside, offset, region, k, v, factor = load_keys(
        number, QKV, head, window, H, W, C, PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE
    )
    logits = dot(q, tl.trans(k), INTERPRETED) * (factor * scale)[None, :]
    logits = add_bias(
        logits, TABLE, number_i[:, None], number[None, :], offset_i[:, None], offset[None, :],
        region_i[:, None], region[None, :], PREFIX, WH, WW, SHIFT,
    )  # fmt: skip
    logits = tl.where(inside[None, :], logits, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(logits, 1))
    weight = tl.exp2(logits - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weight, 1)
    out = out * shrink[:, None] + dot(narrowed(weight, v.dtype, INTERPRETED), v, INTERPRETED)
    return new_max, row_sum, out


@triton.jit
def _forward(
    QKV, BIAS, TABLE, SCALE, OUT, LSE, rows, H, W, heads,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    N: tl.constexpr = PREFIX + WH * WW
    TILES: tl.constexpr = (N + TILE - 1) // TILE
    dtype: tl.constexpr = QKV.dtype.element_ty
    program = tl.program_id(0)
    head, window = program // TILES % heads, program // (TILES * heads)
    C = heads * D
    number = program % TILES * TILE + tl.arange(0, TILE)
    row, inside, offset, region, q, _ = load_queries(
        number, QKV, BIAS, head, window, H, W, C, PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE
    )
    q = narrowed(q, dtype, INTERPRETED)
    scale = tl.load(SCALE + head) * LOG2_E
    table = TABLE
    if TABLE is not None:
        table = TABLE + head * ((2 * WH - 1) * (2 * WW - 1) + 3 * PREFIX)
    # Finite, so that a step with only padding does not subtract infinities.
    row_max = tl.full([TILE], -1e30, tl.float32)
    row_sum = tl.zeros([TILE], tl.float32)
    out = tl.zeros([TILE, BD], tl.float32)
    for first in range(0, N - REST, STEP):
        row_max, row_sum, out = _forward_keys(
            first + tl.arange(0, STEP), q, row_max, row_sum, out, QKV, table, scale,
            number, offset, region, head, window, H, W, C,
            PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE, INTERPRETED,
        )  # fmt: skip
    if REST > 0:
        row_max, row_sum, out = _forward_keys(
            N - REST + tl.arange(0, triton.next_power_of_2(max(REST, 16))),
            q, row_max, row_sum, out, QKV, table, scale,
            number, offset, region, head, window, H, W, C,
            PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE, INTERPRETED,
        )  # fmt: skip
    out = out / row_sum[:, None] + load_bias(BIAS, C + head * D, D, BD)
    d = tl.arange(0, BD)
    at = row[:, None] * C + (head * D + d)[None, :]
    tl.store(OUT + at, narrowed(out, dtype, INTERPRETED), mask=inside[:, None] & (d < D)[None, :])
    tl.store(LSE + head * rows + row, row_max + tl.log2(row_sum), mask=inside)


def forward(
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    scale: Tensor,
    *numbers: int,
) -> tuple[Tensor, Tensor]:
    """Launches; arguments and results as of the operation `fd_large::window_attention`."""
    geometry = Geometry.of(qkv, *numbers)
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    lse = qkv.new_empty(geometry.num_heads, *qkv.shape[:2], dtype=torch.float32)
    programs = qkv.shape[0] * geometry.windows * geometry.num_heads * geometry.tiles
    with on_device(qkv):
        _forward[(programs,)](
            qkv, bias, _in_bits(table), scale, out, lse, qkv.shape[0] * qkv.shape[1],
            geometry.height, geometry.width, geometry.num_heads,
            STEP=geometry.step, REST=geometry.rest, **_constants(geometry, qkv.dtype),
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    scale: Tensor,
    out: Tensor,
    lse: Tensor,
    *numbers: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches; arguments and results as of `fd_large::window_attention_backward`."""
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
    with on_device(qkv):
        _backward[(heads * (tables + 2 * chunks * geometry.tiles),)](
            qkv, bias, _in_bits(table), scale, out, dout, lse, dqkv, dbias, dscale, parts,
            batch * qkv.shape[1], geometry.height, geometry.width, heads, batch * geometry.windows,
            chunks, groups,
            STEP=16, **slots, **_constants(geometry, qkv.dtype),
        )  # fmt: skip
        dtable = lse.new_empty((0,) if table is None else table.shape)
        if table is not None:
            offsets = len(table) - 3 * geometry.prefix
            gather_table[(triton.cdiv(offsets, 64), heads)](
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

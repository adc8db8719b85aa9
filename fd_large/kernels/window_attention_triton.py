"""Triton kernels of `window_attention.py`: tokens are read and written in the image's layout.

The logits of a tile stay in registers, so there is no (N, N) map; logits, softmax and sums are
float32. This file has the forward kernel; what the kernels share is in
`window_attention_tiles_triton.py`, the backward in `window_attention_backward_triton.py` and
`window_attention_table_triton.py`, the launches in `window_attention_launch.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fd_large.kernels.window_attention_tiles_triton import (
    LOG2_E,
    add_bias,
    dot,
    load_bias,
    load_keys,
    load_queries,
    narrowed,
)


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

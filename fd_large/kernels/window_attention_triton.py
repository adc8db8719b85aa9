"""Triton kernels of `window_attention.py`: tokens are read and written where the image has them.

A window's tokens are found by arithmetic, so there is no roll, no copy of windows and no mask; the
logits of a tile live in registers, so there is no (N, N) map. Logits, softmax and sums are float32.

Backward is one launch in which programs play three parts, head by head, so that what one part
reads is still in the cache for the next: the gradient of q for a tile of queries, those of k and v
for a tile of keys, and the gradient of the bias table. The last sums over windows in a fixed order
in registers. Its tiles pair rows of a window with rows of the same window, so that along a diagonal
of tiles all sums belong to the same offsets; what is stored is some (w, w) blocks an offset of
rows, which a second kernel gathers in a fixed order: no atomics.
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
from fd_large.kernels.window_attention import Geometry

# Triton's interpreter multiplies bfloat16 wrongly and truncates where a GPU rounds.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_LOG2_E = tl.constexpr(math.log2(math.e))
_PENALTY = tl.constexpr(-100.0 * math.log2(math.e))
_EPS = tl.constexpr(1e-12)


@triton.jit
def _dot(a, b, INTERPRETED: tl.constexpr):
    if INTERPRETED:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision="ieee")
    return product


@triton.jit
def _narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Rounds float32 to nearest even, as a GPU does."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _place(
    number,
    window,
    H,
    W,
    PREFIX: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
):
    """Returns of a window's tokens: rows of the tensor, which exist, table offsets, region ids.

    Numbers below PREFIX are the image's own tokens, the others count along the window's rows.
    """
    columns = tl.cdiv(W, WW)
    of_image = columns * tl.cdiv(H, WH)
    image = (window // of_image).to(tl.int64) * (H * W + PREFIX)
    top = (window % of_image) // columns * WH
    left = window % columns * WW
    inside = number < PREFIX + WH * WW
    patch = tl.where(inside & (number >= PREFIX), number - PREFIX, 0)
    offset = patch // WW * (2 * WW - 1) + patch % WW
    # In the frame that the shift makes, then in the image's.
    y, x = top + patch // WW, left + patch % WW
    region = y * 0
    if SHIFT > 0:
        bottom, right = tl.cdiv(H, WH) * WH, columns * WW
        region = 3 * ((y >= bottom - WH).to(tl.int32) + (y >= bottom - SHIFT).to(tl.int32))
        region += (x >= right - WW).to(tl.int32) + (x >= right - SHIFT).to(tl.int32)
        y, x = y + SHIFT, x + SHIFT
        y, x = tl.where(y >= bottom, y - bottom, y), tl.where(x >= right, x - right, x)
    if PADDED:
        inside = inside & (y < H) & (x < W)
    row = image + PREFIX + y * W + x
    if PREFIX > 0:
        row = tl.where(number < PREFIX, image + number, row)
    return row, inside, offset, region


@triton.jit
def _load(POINTER, row, inside, column, stride, D: tl.constexpr, BD: tl.constexpr):
    """Returns a head's D numbers of each token; 0 where there is none."""
    d = tl.arange(0, BD)
    at = row[:, None] * stride + (column + d)[None, :]
    return tl.load(POINTER + at, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _load_bias(BIAS, column, D: tl.constexpr, BD: tl.constexpr):
    """Returns a head's D biases as float32; 0 where there is no bias."""
    d = tl.arange(0, BD)
    bias = tl.zeros([BD], tl.float32)
    if BIAS is not None:
        bias += tl.load(BIAS + column + d, mask=d < D, other=0.0).to(tl.float32)
    return bias[None, :]


@triton.jit
def _unit_factor(x, COSINE: tl.constexpr):
    """Returns by how much vectors are multiplied to have length 1; 1 for a dot product."""
    x = x.to(tl.float32)
    factor = tl.full([x.shape[0]], 1.0, tl.float32)
    if COSINE:
        factor = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), _EPS)
    return factor


@triton.jit
def _through_unit(gradient, unit, factor, COSINE: tl.constexpr):
    """Returns the gradient before normalisation."""
    if COSINE:
        along = tl.where(factor < 1.0 / _EPS, tl.sum(gradient * unit, 1), 0.0)
        gradient = (gradient - unit * along[:, None]) * factor[:, None]
    return gradient


@triton.jit
def _queries(
    number,
    QKV,
    BIAS,
    head,
    window,
    H,
    W,
    C,
    PREFIX: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    COSINE: tl.constexpr,
):
    """Returns of queries: rows, which exist, offsets, regions, unit vectors and their factors."""
    row, inside, offset, region = _place(number, window, H, W, PREFIX, WH, WW, SHIFT, PADDED)
    q = _load(QKV, row, inside, head * D, 3 * C, D, BD).to(tl.float32)
    q += _load_bias(BIAS, head * D, D, BD)
    factor = _unit_factor(q, COSINE)
    return row, inside, offset, region, q * factor[:, None], factor


@triton.jit
def _keys(
    number,
    QKV,
    head,
    window,
    H,
    W,
    C,
    PREFIX: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    COSINE: tl.constexpr,
):
    """Returns of keys: rows, which exist, offsets, regions, k, v and the factors of k.

    As they are stored: k has no bias, and that of v can wait, since weights sum to 1.
    """
    row, inside, offset, region = _place(number, window, H, W, PREFIX, WH, WW, SHIFT, PADDED)
    k = _load(QKV, row, inside, C + head * D, 3 * C, D, BD)
    v = _load(QKV, row, inside, 2 * C + head * D, 3 * C, D, BD)
    return row, inside, offset, region, k, v, _unit_factor(k, COSINE)


@triton.jit
def _add_bias(
    logits,
    TABLE,
    number_i,
    number_j,
    offset_i,
    offset_j,
    region_i,
    region_j,
    PREFIX: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFT: tl.constexpr,
):
    """Adds a head's position bias and the penalty between regions, both in units of log 2.

    i are queries and j keys; which of them are rows is the caller's choice.
    """
    if TABLE is not None:
        at = offset_i - offset_j + ((WH - 1) * (2 * WW - 1) + WW - 1)
        if PREFIX > 0:
            n = (2 * WH - 1) * (2 * WW - 1)
            to_prefix = tl.where(number_i < PREFIX, n + 2, n + 1)
            at = tl.where(number_j < PREFIX, to_prefix, tl.where(number_i < PREFIX, n, at))
        logits += tl.load(TABLE + at)
    if SHIFT > 0:
        logits += tl.where(region_i != region_j, _PENALTY, 0.0)
    return logits


@triton.jit
def _forward_keys(
    number,
    q,
    row_max,
    row_sum,
    out,
    QKV,
    TABLE,
    scale,
    number_i,
    offset_i,
    region_i,
    head,
    window,
    H,
    W,
    C,
    PREFIX: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One step of the running softmax: the keys of these numbers."""
    _, inside, offset, region, k, v, factor = _keys(
        number, QKV, head, window, H, W, C, PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE
    )
    logits = _dot(q, tl.trans(k), INTERPRETED) * (factor * scale)[None, :]
    logits = _add_bias(
        logits, TABLE, number_i[:, None], number[None, :], offset_i[:, None], offset[None, :],
        region_i[:, None], region[None, :], PREFIX, WH, WW, SHIFT,
    )  # fmt: skip
    logits = tl.where(inside[None, :], logits, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(logits, 1))
    weight = tl.exp2(logits - new_max[:, None])
    shrink = tl.exp2(row_max - new_max)
    row_sum = row_sum * shrink + tl.sum(weight, 1)
    out = out * shrink[:, None] + _dot(_narrow(weight, v.dtype, INTERPRETED), v, INTERPRETED)
    return new_max, row_sum, out


@triton.jit
def _forward(
    QKV,
    BIAS,
    TABLE,
    SCALE,
    OUT,
    LSE,
    rows,
    H,
    W,
    heads,
    PREFIX: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    REST: tl.constexpr,
):
    N: tl.constexpr = PREFIX + WH * WW
    TILES: tl.constexpr = (N + TILE - 1) // TILE
    dtype: tl.constexpr = QKV.dtype.element_ty
    program = tl.program_id(0)
    head, window = program // TILES % heads, program // (TILES * heads)
    C = heads * D
    number = program % TILES * TILE + tl.arange(0, TILE)
    row, inside, offset, region, q, _ = _queries(
        number, QKV, BIAS, head, window, H, W, C, PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE
    )
    q = _narrow(q, dtype, INTERPRETED)
    scale = tl.load(SCALE + head) * _LOG2_E
    table = TABLE
    if TABLE is not None:
        table = TABLE + head * ((2 * WH - 1) * (2 * WW - 1) + 3 * PREFIX)
    # Finite, so that a step whose keys are all padding is no difference of infinities.
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
    out = out / row_sum[:, None] + _load_bias(BIAS, C + head * D, D, BD)
    d = tl.arange(0, BD)
    at = row[:, None] * C + (head * D + d)[None, :]
    tl.store(OUT + at, _narrow(out, dtype, INTERPRETED), mask=inside[:, None] & (d < D)[None, :])
    tl.store(LSE + head * rows + row, row_max + tl.log2(row_sum), mask=inside)


@triton.jit
def _softmax_gradient(
    rows,
    columns,
    drows,
    dcolumns,
    scale,
    bias,
    lse,
    delta,
    key_inside,
    INTERPRETED: tl.constexpr,
):
    """Returns a tile's products, its weights, made again from lse, and its logits' gradient.

    Rows are queries and columns keys, or the other way round; the rest has shapes to match.
    """
    product = _dot(rows, tl.trans(columns), INTERPRETED)
    weight = tl.where(key_inside, tl.exp2(product * scale + bias - lse), 0.0)
    dweight = _dot(drows, tl.trans(dcolumns), INTERPRETED)
    return product, weight, weight * (dweight - delta)


@triton.jit
def _output_terms(
    row,
    inside,
    BIAS,
    OUT,
    DOUT,
    LSE,
    rows,
    head,
    C,
    D: tl.constexpr,
    BD: tl.constexpr,
):
    """Returns of queries: the gradient of their outputs, lse, and delta = sum(do * (o - bias))."""
    dout = _load(DOUT, row, inside, head * D, C, D, BD)
    out = _load(OUT, row, inside, head * D, C, D, BD).to(tl.float32)
    out -= _load_bias(BIAS, C + head * D, D, BD)
    # Infinite where there is no query: all its weights are 0 then.
    lse = tl.load(LSE + head * rows + row, mask=inside, other=float("inf"))
    return dout, lse, tl.sum(dout.to(tl.float32) * out, 1)


@triton.jit
def _backward_keys(
    number,
    total,
    excess,
    cosine,
    q,
    dout,
    lse,
    delta,
    number_i,
    offset_i,
    region_i,
    QKV,
    TABLE,
    scale,
    head,
    window,
    H,
    W,
    C,
    PREFIX: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Adds to sums of a tile of queries what the keys of these numbers give.

    These are the gradient of q over scale, and for the scale's: by how much the gradients of a
    query's logits sum to more than 0, and the mean of its cosines.
    """
    _, inside, offset, region, k, v, factor = _keys(
        number, QKV, head, window, H, W, C, PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE
    )
    bias = _add_bias(
        0.0, TABLE, number_i[:, None], number[None, :], offset_i[:, None], offset[None, :],
        region_i[:, None], region[None, :], PREFIX, WH, WW, SHIFT,
    )  # fmt: skip
    product, weight, dlogits = _softmax_gradient(
        q, k, dout, v, (factor * scale)[None, :], bias, lse[:, None], delta[:, None],
        inside[None, :], INTERPRETED,
    )  # fmt: skip
    if COSINE:
        excess += tl.sum(dlogits, 1)
        cosine += tl.sum(weight * product * factor[None, :], 1)
    dlogits = _narrow(dlogits * factor[None, :], k.dtype, INTERPRETED)
    return total + _dot(dlogits, k, INTERPRETED), excess, cosine


@triton.jit
def _backward_queries(
    number,
    dk,
    dv,
    k,
    v,
    scale,
    key_inside,
    number_j,
    offset_j,
    region_j,
    QKV,
    BIAS,
    TABLE,
    OUT,
    DOUT,
    LSE,
    rows,
    head,
    window,
    H,
    W,
    C,
    PREFIX: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Adds to a tile of keys what the queries of these numbers give; keys are the rows here."""
    row, inside, offset, region, q, _ = _queries(
        number, QKV, BIAS, head, window, H, W, C, PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE
    )
    q = _narrow(q, k.dtype, INTERPRETED)
    dout, lse, delta = _output_terms(row, inside, BIAS, OUT, DOUT, LSE, rows, head, C, D, BD)
    bias = _add_bias(
        0.0, TABLE, number[None, :], number_j[:, None], offset[None, :], offset_j[:, None],
        region[None, :], region_j[:, None], PREFIX, WH, WW, SHIFT,
    )  # fmt: skip
    _, weight, dlogits = _softmax_gradient(
        k, q, v, dout, scale[:, None], bias, lse[None, :], delta[None, :], key_inside[:, None],
        INTERPRETED,
    )  # fmt: skip
    dv += _dot(_narrow(weight, k.dtype, INTERPRETED), dout, INTERPRETED)
    dk += _dot(_narrow(dlogits, k.dtype, INTERPRETED), q, INTERPRETED)
    return dk, dv


@triton.jit
def _store(
    gradient,
    DQKV,
    row,
    inside,
    column,
    stride,
    D: tl.constexpr,
    BD: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    d = tl.arange(0, BD)
    at = row[:, None] * stride + (column + d)[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(DQKV + at, _narrow(gradient, DQKV.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def _query_part(
    part,
    head,
    QKV,
    BIAS,
    TABLE,
    scale,
    OUT,
    DOUT,
    LSE,
    DQKV,
    DBIAS,
    DSCALE,
    rows,
    H,
    W,
    heads,
    windows,
    chunks,
    PREFIX: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Gradients of q, the bias and the scale: a tile of queries of every chunks-th window."""
    N: tl.constexpr = PREFIX + WH * WW
    TILES: tl.constexpr = (N + TILE - 1) // TILE
    dtype: tl.constexpr = QKV.dtype.element_ty
    C = heads * D
    number = part % TILES * TILE + tl.arange(0, TILE)
    dq_sum = tl.zeros([BD], tl.float32)
    dout_sum = tl.zeros([BD], tl.float32)
    dscale = tl.zeros([TILE], tl.float32)
    for window in range(part // TILES, windows, chunks):
        row, inside, offset, region, q, factor = _queries(
            number, QKV, BIAS, head, window, H, W, C, PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE
        )
        dout, lse, delta = _output_terms(row, inside, BIAS, OUT, DOUT, LSE, rows, head, C, D, BD)
        narrow = _narrow(q, dtype, INTERPRETED)
        total = tl.zeros([TILE, BD], tl.float32)
        excess = tl.zeros([TILE], tl.float32)
        cosine = tl.zeros([TILE], tl.float32)
        for first in range(0, N, STEP):
            total, excess, cosine = _backward_keys(
                first + tl.arange(0, STEP), total, excess, cosine, narrow, dout, lse, delta,
                number, offset, region, QKV, TABLE, scale * _LOG2_E, head, window, H, W, C,
                PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE, INTERPRETED,
            )  # fmt: skip
        gradient = _through_unit(total * scale, q, factor, COSINE)
        _store(gradient, DQKV, row, inside, head * D, 3 * C, D, BD, INTERPRETED)
        # Queries that do not exist have lse and output that make these sums 0. A query's gradients
        # sum to 0 but for the rounding of its output in delta, which is taken out again.
        dscale += tl.sum(q * total, 1) - excess * cosine
        dq_sum += tl.sum(gradient, 0)
        dout_sum += tl.sum(dout.to(tl.float32), 0)
    if DSCALE is not None:
        tl.store(DSCALE + head * (chunks * TILES) + part, tl.sum(dscale, 0))
    if BIAS is not None:
        d = tl.arange(0, BD)
        at = DBIAS + part * (2 * C) + head * D + d
        tl.store(at, dq_sum, mask=d < D)
        # Weights sum to 1, so each output passes its gradient to the bias of v whole.
        tl.store(at + C, dout_sum, mask=d < D)


@triton.jit
def _key_part(
    part,
    head,
    QKV,
    BIAS,
    TABLE,
    scale,
    OUT,
    DOUT,
    LSE,
    DQKV,
    rows,
    H,
    W,
    heads,
    windows,
    chunks,
    PREFIX: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
):
    """Gradients of k and v: a tile of keys of every chunks-th window."""
    N: tl.constexpr = PREFIX + WH * WW
    TILES: tl.constexpr = (N + TILE - 1) // TILE
    C = heads * D
    number = part % TILES * TILE + tl.arange(0, TILE)
    for window in range(part // TILES, windows, chunks):
        row, inside, offset, region, k, v, factor = _keys(
            number, QKV, head, window, H, W, C, PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE
        )
        scales = factor * (scale * _LOG2_E)
        dk = tl.zeros([TILE, BD], tl.float32)
        dv = tl.zeros([TILE, BD], tl.float32)
        for first in range(0, N, STEP):
            dk, dv = _backward_queries(
                first + tl.arange(0, STEP), dk, dv, k, v, scales, inside, number, offset, region,
                QKV, BIAS, TABLE, OUT, DOUT, LSE, rows, head, window, H, W, C,
                PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE, INTERPRETED,
            )  # fmt: skip
        unit = k.to(tl.float32) * factor[:, None]
        dk = _through_unit(dk * scale, unit, factor, COSINE)
        _store(dk, DQKV, row, inside, C + head * D, 3 * C, D, BD, INTERPRETED)
        _store(dv, DQKV, row, inside, 2 * C + head * D, 3 * C, D, BD, INTERPRETED)


@triton.jit
def _slots(block, blocks, PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr,
           ROW: tl.constexpr, SLOTS: tl.constexpr):  # fmt: skip
    """Returns numbers of the tokens in a block's slots; past the last where a slot is empty.

    A slot is (row, column), rows padded to ROW; the block after the last one is the prefix.
    """
    slot = tl.arange(0, SLOTS)
    y, x = block * (SLOTS // ROW) + slot // ROW, slot % ROW
    number = tl.where((y < WH) & (x < WW), PREFIX + y * WW + x, PREFIX + WH * WW)
    if PREFIX > 0:
        prefix = tl.where(slot < PREFIX, slot, PREFIX + WH * WW)
        number = tl.where(block == blocks, prefix, number)
    return number


@triton.jit
def _table_part(
    part,
    head,
    QKV,
    BIAS,
    TABLE,
    scale,
    OUT,
    DOUT,
    LSE,
    PARTS,
    rows,
    H,
    W,
    heads,
    windows,
    groups,
    PREFIX: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    SLOTS: tl.constexpr,
    ROW: tl.constexpr,
):
    """Gradient of the table: a diagonal of tiles, summed over it and over every groups-th window.

    The tiles (I, I - d) make one diagonal; the prefix's row, column and corner are three more.
    """
    R: tl.constexpr = SLOTS // ROW
    BLOCKS: tl.constexpr = (WH + R - 1) // R
    DIAGONALS: tl.constexpr = 2 * BLOCKS - 1
    KINDS: tl.constexpr = DIAGONALS + 3 * PREFIX
    C = heads * D
    kind, group = part % KINDS, part // KINDS
    apart = kind - (BLOCKS - 1)
    first_i, first_j = tl.maximum(apart, 0), tl.maximum(-apart, 0)
    step_i, step_j = 1, 1
    count = BLOCKS - tl.abs(apart)
    if PREFIX > 0:
        beside = kind >= DIAGONALS
        step_i = tl.where(beside & (kind != DIAGONALS + 1), 0, 1)
        step_j = tl.where(beside & (kind != DIAGONALS), 0, 1)
        first_i = tl.where(beside, BLOCKS * (1 - step_i), first_i)
        first_j = tl.where(beside, BLOCKS * (1 - step_j), first_j)
        count = tl.where(beside, tl.where(kind == DIAGONALS + 2, 1, BLOCKS), count)
    # Offsets do not change along a diagonal, and its first tile has all slots that any has.
    number_i = _slots(first_i, BLOCKS, PREFIX, WH, WW, ROW, SLOTS)
    number_j = _slots(first_j, BLOCKS, PREFIX, WH, WW, ROW, SLOTS)
    offset_i = _place(number_i, 0, H, W, PREFIX, WH, WW, 0, False)[2]
    offset_j = _place(number_j, 0, H, W, PREFIX, WH, WW, 0, False)[2]
    position = _add_bias(
        0.0, TABLE, number_i[:, None], number_j[None, :], offset_i[:, None], offset_j[None, :],
        0, 0, PREFIX, WH, WW, 0,
    )  # fmt: skip
    total = tl.zeros([SLOTS, SLOTS], tl.float32)
    for window in range(group, windows, groups):
        for n in range(count):
            number_i = _slots(first_i + n * step_i, BLOCKS, PREFIX, WH, WW, ROW, SLOTS)
            number_j = _slots(first_j + n * step_j, BLOCKS, PREFIX, WH, WW, ROW, SLOTS)
            row, inside, _, region_i, q, _ = _queries(
                number_i, QKV, BIAS, head, window, H, W, C,
                PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE,
            )  # fmt: skip
            dout, lse, delta = _output_terms(
                row, inside, BIAS, OUT, DOUT, LSE, rows, head, C, D, BD
            )
            _, inside, _, region_j, k, v, factor = _keys(
                number_j, QKV, head, window, H, W, C,
                PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE,
            )  # fmt: skip
            bias = position
            if SHIFT > 0:
                bias = position + tl.where(region_i[:, None] != region_j[None, :], _PENALTY, 0.0)
            _, _, dlogits = _softmax_gradient(
                _narrow(q, k.dtype, INTERPRETED), k, dout, v, (factor * (scale * _LOG2_E))[None, :],
                bias, lse[:, None], delta[:, None], inside[None, :], INTERPRETED,
            )  # fmt: skip
            total += dlogits
    # Pairs of rows that lie equally far apart belong to the same offsets: one (w, w) block for each
    # of the 2 R - 1 distances inside a tile.
    slot = tl.arange(0, SLOTS)
    distance = (slot // ROW)[:, None] - (slot // ROW)[None, :]
    x = tl.arange(0, ROW)
    at = PARTS + ((group * heads + head) * KINDS + kind) * ((2 * R - 1) * WW * WW)
    at += x[:, None] * WW + x[None, :]
    mask = (x < WW)[:, None] & (x < WW)[None, :]
    for n in range(2 * R - 1):
        chosen = tl.where(distance == n - (R - 1), total, 0.0)
        block = tl.sum(tl.sum(tl.reshape(chosen, [R, ROW, R, ROW]), 2), 0)
        tl.store(at + n * (WW * WW), block, mask=mask)


@triton.jit
def _backward(
    QKV,
    BIAS,
    TABLE,
    SCALE,
    OUT,
    DOUT,
    LSE,
    DQKV,
    DBIAS,
    DSCALE,
    PARTS,
    rows,
    H,
    W,
    heads,
    windows,
    chunks,
    groups,
    PREFIX: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TILE: tl.constexpr,
    STEP: tl.constexpr,
    SLOTS: tl.constexpr,
    ROW: tl.constexpr,
):
    N: tl.constexpr = PREFIX + WH * WW
    TILES: tl.constexpr = (N + TILE - 1) // TILE
    KINDS: tl.constexpr = 2 * ((WH + SLOTS // ROW - 1) // (SLOTS // ROW)) - 1 + 3 * PREFIX
    tables = 0
    if PARTS is not None:
        tables = groups * KINDS
    parts = chunks * TILES
    program = tl.program_id(0)
    head, part = program // (tables + 2 * parts), program % (tables + 2 * parts)
    scale = tl.load(SCALE + head)
    table = TABLE
    if TABLE is not None:
        table = TABLE + head * ((2 * WH - 1) * (2 * WW - 1) + 3 * PREFIX)
    if part < tables:
        if PARTS is not None:
            _table_part(
                part, head, QKV, BIAS, table, scale, OUT, DOUT, LSE, PARTS,
                rows, H, W, heads, windows, groups,
                PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE, INTERPRETED, SLOTS, ROW,
            )  # fmt: skip
    elif part < tables + parts:
        _key_part(
            part - tables, head, QKV, BIAS, table, scale, OUT, DOUT, LSE, DQKV,
            rows, H, W, heads, windows, chunks,
            PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE, INTERPRETED, TILE, STEP,
        )  # fmt: skip
    else:
        _query_part(
            part - tables - parts, head, QKV, BIAS, table, scale, OUT, DOUT, LSE, DQKV, DBIAS,
            DSCALE, rows, H, W, heads, windows, chunks,
            PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE, INTERPRETED, TILE, STEP,
        )  # fmt: skip


@triton.jit
def _gather_table(
    PARTS,
    DTABLE,
    heads,
    groups,
    PREFIX: tl.constexpr,
    WH: tl.constexpr,
    WW: tl.constexpr,
    SLOTS: tl.constexpr,
    ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums what belongs to each offset, in the order of groups, row distances and columns."""
    R: tl.constexpr = SLOTS // ROW
    BLOCKS: tl.constexpr = (WH + R - 1) // R
    KINDS: tl.constexpr = 2 * BLOCKS - 1 + 3 * PREFIX
    SIZE: tl.constexpr = (2 * R - 1) * WW * WW
    OFFSETS: tl.constexpr = (2 * WH - 1) * (2 * WW - 1)
    head = tl.program_id(1)
    offset = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dy, dx = offset // (2 * WW - 1) - (WH - 1), offset % (2 * WW - 1) - (WW - 1)
    total = tl.zeros([BLOCK], tl.float32)
    for group in range(groups):
        parts = PARTS + (group * heads + head) * (KINDS * SIZE)
        for turn in range(2):
            # dy = R * diagonal + distance, with a distance from 1 - R to R - 1: two ways at most.
            diagonal = tl.where(dy >= 0, dy // R, -((R - 1 - dy) // R)) + turn
            distance = dy - R * diagonal
            kind = diagonal + BLOCKS - 1
            valid = (offset < OFFSETS) & (distance > -R) & (kind >= 0) & (kind < 2 * BLOCKS - 1)
            base = kind * SIZE + (distance + R - 1) * (WW * WW)
            for key in range(WW):
                query = key + dx
                mask = valid & (query >= 0) & (query < WW)
                total += tl.load(parts + base + query * WW + key, mask=mask, other=0.0)
    tl.store(DTABLE + offset * heads + head, total, mask=offset < OFFSETS)


def forward(
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    scale: Tensor,
    geometry: Geometry,
) -> tuple[Tensor, Tensor]:
    """Launches; arguments and results as of the operation `fd_large::window_attention`."""
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    lse = qkv.new_empty(geometry.num_heads, *qkv.shape[:2], dtype=torch.float32)
    programs = qkv.shape[0] * geometry.windows * geometry.num_heads * geometry.tiles
    with on_device(qkv):
        _forward[(programs,)](
            qkv,
            bias,
            _in_bits(table),
            scale,
            out,
            lse,
            qkv.shape[0] * qkv.shape[1],
            geometry.height,
            geometry.width,
            geometry.num_heads,
            STEP=geometry.step,
            REST=geometry.rest,
            **_constants(geometry, qkv.dtype),
        )
    return out, lse


def backward(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    scale: Tensor,
    out: Tensor,
    lse: Tensor,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches; arguments and results as of `fd_large::window_attention_backward`."""
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
            qkv,
            bias,
            _in_bits(table),
            scale,
            out,
            dout,
            lse,
            dqkv,
            dbias,
            dscale,
            parts,
            batch * qkv.shape[1],
            geometry.height,
            geometry.width,
            heads,
            batch * geometry.windows,
            chunks,
            groups,
            STEP=16,
            **slots,
            **_constants(geometry, qkv.dtype),
        )
        dtable = lse.new_empty((0,) if table is None else table.shape)
        if table is not None:
            offsets = len(table) - 3 * geometry.prefix
            _gather_table[(triton.cdiv(offsets, 64), heads)](
                parts,
                dtable,
                heads,
                groups,
                PREFIX=geometry.prefix,
                WH=geometry.window[0],
                WW=geometry.window[1],
                BLOCK=64,
                **slots,
                num_warps=2,
            )
            if geometry.prefix:
                dtable[offsets:] = parts[:, :, -3:].flatten(3).sum((0, 3)).t()
    return (
        dqkv,
        lse.new_empty(0) if dbias is None else dbias.sum(0),
        dtable,
        lse.new_empty(0) if dscale is None else dscale.sum(1),
    )


def _in_bits(table: Tensor | None) -> Tensor | None:
    """Head after head, in units of log 2, since the kernels take powers of 2."""
    if table is None:
        return None
    turned = table.new_empty(table.shape[::-1])
    return torch.mul(table.t(), math.log2(math.e), out=turned)


def _constants(geometry: Geometry, dtype: torch.dtype) -> dict[str, Any]:
    window = geometry.window
    # As many as keep tiles in registers; a window without a table may be any row of tokens.
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

"""Triton kernels of `window_attention.py`: tokens are read and written in the image's layout.

A window's tokens are found by arithmetic, without a roll, a copy of windows or a mask. The logits
of a tile stay in registers, so there is no (N, N) map; logits, softmax and sums are float32. The
file has the shared parts first (places of tokens, tiles of q, k and v, logits), then the forward.
The backward is in `window_attention_backward_triton.py`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LOG2_E = tl.constexpr(math.log2(math.e))
PENALTY = tl.constexpr(-100.0 * math.log2(math.e))
EPS = tl.constexpr(1e-12)


@triton.jit
def dot(a, b, INTERPRETED: tl.constexpr):
    """Returns the matrix product of two tiles.

    Triton's interpreter gets the tiles in float32, since it multiplies bfloat16 incorrectly.
    """
    if INTERPRETED:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision="ieee")
    return product


@triton.jit
def narrowed(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Rounds float32 to `dtype`, to nearest even, in Triton's interpreter as on a GPU."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def place(
    number, window, H, W,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Returns four values for each token of a window whose index is in `number`.

    The values are the token's row in the (B * N, ...) tensors, whether the token exists, the
    token's offset in the position table, and the token's region id. Indices below PREFIX are the
    image's prefix tokens; higher indices count along the window's rows.
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
def load_head(POINTER, row, inside, column, stride, D: tl.constexpr, BD: tl.constexpr):
    """Returns a head's values of each token, (tokens, BD); 0 for missing tokens and past D."""
    d = tl.arange(0, BD)
    at = row[:, None] * stride + (column + d)[None, :]
    return tl.load(POINTER + at, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_bias(BIAS, column, D: tl.constexpr, BD: tl.constexpr):
    """Returns a head's bias, (1, BD) float32; zeros if there is no bias."""
    d = tl.arange(0, BD)
    bias = tl.zeros([BD], tl.float32)
    if BIAS is not None:
        bias += tl.load(BIAS + column + d, mask=d < D, other=0.0).to(tl.float32)
    return bias[None, :]


@triton.jit
def unit_factor(x, COSINE: tl.constexpr):
    """Returns the factors that scale vectors to an L2 norm of 1, or 1 if COSINE is false."""
    x = x.to(tl.float32)
    factor = tl.full([x.shape[0]], 1.0, tl.float32)
    if COSINE:
        factor = 1.0 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), EPS)
    return factor


@triton.jit
def load_queries(
    number, QKV, BIAS, head, window, H, W, C,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Returns the results of `place` for a tile of queries, the scaled queries and their factors.

    The factors come from `unit_factor`. The queries with their bias are multiplied by the factors.
    """
    row, inside, offset, region = place(number, window, H, W, PREFIX, WH, WW, SHIFT, PADDED)
    q = load_head(QKV, row, inside, head * D, 3 * C, D, BD).to(tl.float32)
    q += load_bias(BIAS, head * D, D, BD)
    factor = unit_factor(q, COSINE)
    return row, inside, offset, region, q * factor[:, None], factor


@triton.jit
def load_keys(
    number, QKV, head, window, H, W, C,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr,
):  # fmt: skip
    """Returns the results of `place` for a tile of keys, then k, v and the factors of k.

    k and v are as stored. k has no bias; the bias of v is added to the output instead, because the
    softmax's weights sum to 1. The factors, from `unit_factor`, are not applied yet.
    """
    row, inside, offset, region = place(number, window, H, W, PREFIX, WH, WW, SHIFT, PADDED)
    k = load_head(QKV, row, inside, C + head * D, 3 * C, D, BD)
    v = load_head(QKV, row, inside, 2 * C + head * D, 3 * C, D, BD)
    return row, inside, offset, region, k, v, unit_factor(k, COSINE)


@triton.jit
def add_bias(
    logits, TABLE, number_i, number_j, offset_i, offset_j, region_i, region_j,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """Returns the logits plus a head's position bias and the penalty between regions.

    Logits, bias and penalty are in units of log 2. Names that end in _i are for queries, and names
    in _j for keys; the caller decides which of the two are the rows of the tile.
    """
    if TABLE is not None:
        at = offset_i - offset_j + ((WH - 1) * (2 * WW - 1) + WW - 1)
        if PREFIX > 0:
            n = (2 * WH - 1) * (2 * WW - 1)
            to_prefix = tl.where(number_i < PREFIX, n + 2, n + 1)
            at = tl.where(number_j < PREFIX, to_prefix, tl.where(number_i < PREFIX, n, at))
        logits += tl.load(TABLE + at)
    if SHIFT > 0:
        logits += tl.where(region_i != region_j, PENALTY, 0.0)
    return logits


@triton.jit
def output_terms(
    row, inside, BIAS, OUT, DOUT, LSE, rows, head, C,
    D: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Returns dout, lse and delta = sum(dout * (out - bias of v)) of each query.

    lse is log2 of the denominator of a query's softmax.
    """
    dout = load_head(DOUT, row, inside, head * D, C, D, BD)
    out = load_head(OUT, row, inside, head * D, C, D, BD).to(tl.float32)
    out -= load_bias(BIAS, C + head * D, D, BD)
    # Infinite where there is no query: all its weights are 0 then.
    lse = tl.load(LSE + head * rows + row, mask=inside, other=float("inf"))
    return dout, lse, tl.sum(dout.to(tl.float32) * out, 1)


@triton.jit
def softmax_gradient(
    rows, columns, drows, dcolumns, scale, bias, lse, delta, key_inside,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Returns a tile's dot products, softmax weights (recomputed from lse) and logits' gradient.

    `rows` are queries and `columns` keys, or the reverse. `drows` belongs to `rows` and `dcolumns`
    to `columns`: for queries it is the gradient of the output, and for keys it is v.
    """
    product = dot(rows, tl.trans(columns), INTERPRETED)
    weight = tl.where(key_inside, tl.exp2(product * scale + bias - lse), 0.0)
    dweight = dot(drows, tl.trans(dcolumns), INTERPRETED)
    return product, weight, weight * (dweight - delta)


@triton.jit
def _forward_keys(
    number, q, row_max, row_sum, out, QKV, TABLE, scale, number_i, offset_i, region_i, head, window,
    H, W, C,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Makes one step of the running softmax, over the keys with the indices `number`.

    Returns the new maximum, sum and output of each query.
    """
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

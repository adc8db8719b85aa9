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
    """Returns the matrix product of the tiles `a` and `b`, float32.

    If INTERPRETED is true, kernels run in Triton's interpreter. The interpreter gets the tiles in
    float32, since it multiplies bfloat16 incorrectly.
    """
    if INTERPRETED:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        product = tl.dot(a, b, input_precision="ieee")
    return product


@triton.jit
def narrowed(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Rounds `x`, which is float32, to `dtype`: to the nearest value, and ties to even.

    If INTERPRETED is true, kernels run in Triton's interpreter, whose own rounding differs.
    """
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
    """Returns where some tokens of a window lie in the image's tensors.

    Args:
        number: (tokens,), indices of the tokens in the window. Indices below PREFIX are the image's
            prefix tokens; higher indices count along the window's rows.
        window: Index of the window among all windows of the batch.
        H: Rows of the map.
        W: Columns of the map.
        PREFIX: Number of prefix tokens.
        WH: Rows of a window.
        WW: Columns of a window.
        SHIFT: Offset of the windows, in tokens.
        PADDED: Whether windows exceed the map.

    Returns: four values for each token: its row in the (B * N, ...) tensors; whether it exists; a
        number of its place in the window, such that the difference between query and key gives the
        row of the position table; the id of its region, 0 without a shift.
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
    """Returns a head's values of each token, (tokens, BD); 0 for missing tokens and past D.

    Args:
        POINTER: Tensor of `stride` columns, with a row for each token of the batch.
        row: (tokens,), the row of each token.
        inside: (tokens,), whether the token exists.
        column: First column of the head's values.
        stride: Number of columns of the tensor.
        D: Number of channels of a head.
        BD: D, rounded up to the width of a tile.
    """
    d = tl.arange(0, BD)
    at = row[:, None] * stride + (column + d)[None, :]
    return tl.load(POINTER + at, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_bias(BIAS, column, D: tl.constexpr, BD: tl.constexpr):
    """Returns a head's part of the biases, (1, BD) float32; zeros if BIAS is None.

    Args:
        BIAS: (2, C), the biases of queries and of values, or None.
        column: Place of the head's first bias among these 2C numbers.
        D: Number of channels of a head.
        BD: D, rounded up to the width of a tile.
    """
    d = tl.arange(0, BD)
    bias = tl.zeros([BD], tl.float32)
    if BIAS is not None:
        bias += tl.load(BIAS + column + d, mask=d < D, other=0.0).to(tl.float32)
    return bias[None, :]


@triton.jit
def unit_factor(x, COSINE: tl.constexpr):
    """Returns the factor that scales each vector of `x` to an L2 norm of 1.

    Args:
        x: (tokens, BD), a vector for each token.
        COSINE: Whether attention uses cosines; if False, all factors are 1.

    Returns: (tokens,) float32.
    """
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
    """Loads a head's queries for a tile of tokens of a window.

    Args:
        number: (tokens,), indices of the tokens in the window.
        QKV: (B * N, 3C), queries, keys and values.
        BIAS: (2, C), the biases of queries and of values, or None.
        head: Index of the head.
        window: Index of the window among all windows of the batch.
        D: Number of channels of a head.
        BD: D, rounded up to the width of a tile.
        COSINE: Whether the queries are scaled to norm 1.

    Returns: the four results of `place`; the queries with their bias, times their factors, (tokens,
        BD) float32; the factors of `unit_factor`, (tokens,).
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
    """Loads a head's keys and values for a tile of tokens of a window.

    Args:
        number: (tokens,), indices of the tokens in the window.
        QKV: (B * N, 3C), queries, keys and values.
        head: Index of the head.
        window: Index of the window among all windows of the batch.
        D: Number of channels of a head.
        BD: D, rounded up to the width of a tile.
        COSINE: Whether attention uses keys of norm 1.

    Returns: the four results of `place`; k and v as stored, (tokens, BD); the factors that scale k
        to norm 1 (`unit_factor`), which are not applied yet, (tokens,). k has no bias. The bias of
        v is added to the output instead, because the softmax's weights sum to 1.
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
    """Adds a head's position bias, and a penalty between tokens of different regions, to logits.

    `logits` and `TABLE` must already be multiplied by log2(e), as the constant `PENALTY` is,
    because the kernels compute powers of 2. Names that end in _i are for queries, and names in _j
    for keys. The caller decides which of the two are the rows of the tile, by the shapes (n, 1) and
    (1, m).

    Args:
        logits: (rows, columns) of a tile, or a number.
        TABLE: The position bias of each offset for this head, or None.
        number_i: Index of each query in the window; number_j: index of each key.
        offset_i: Row times (2 WW - 1) plus column of each query in the window, the third result of
            `place`; offset_j: the same for each key.
        region_i: Region of each query; region_j of each key.
        PREFIX: Number of prefix tokens.
        WH: Rows of a window.
        WW: Columns of a window.
        SHIFT: Offset of the windows, in tokens. With 0 there is no penalty.
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
    """Loads what the backward needs of the output, for a head and a tile of queries.

    Args:
        row: (tokens,), the row of each query in the (B * N, ...) tensors.
        inside: (tokens,), whether the query exists.
        BIAS: (2, C), the biases of queries and of values, or None.
        OUT: (B * N, C), the output.
        DOUT: (B * N, C), the gradient of the output.
        LSE: (heads, B * N), log2 of the denominator of each query's softmax.
        rows: B * N.
        head: Index of the head.
        C: Number of channels of all heads.
        D: Number of channels of a head.
        BD: D, rounded up to the width of a tile.

    Returns: the gradient of the output, dout, (tokens, BD); the query's entry of LSE, (tokens,),
        infinite for a query that does not exist; sum(dout * (out - bias of v)), (tokens,).
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
    """Returns a tile's dot products, softmax weights and gradient of the logits.

    The rows of the tile are queries and its columns keys, or the reverse. The weights are computed
    again from `lse`. A value for each query or key has the shape (number of rows, 1) if these are
    the rows of the tile, or else (1, number of columns).

    Args:
        rows: Queries or keys, (number of rows, BD).
        columns: Keys if the rows are queries, or else queries, (number of columns, BD).
        drows: The gradient of the output if the rows are queries, or else the values v of the keys;
            in the shape of `rows`.
        dcolumns: The same for the columns, in the shape of `columns`.
        scale: Factor of the logits times log2(e), for each key.
        bias: (number of rows, number of columns), result of `add_bias`.
        lse: log2 of the denominator of each query's softmax.
        delta: Third result of `output_terms`, for each query.
        key_inside: Whether each key exists; a missing key has the weight 0.
        INTERPRETED: Whether kernels run in Triton's interpreter.
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
    """Makes one step of the running softmax of a tile of queries, over the keys `number`.

    Args:
        number: (keys,), indices of the keys in the window.
        q: (queries, BD), the queries.
        row_max: (queries,), the maximum of each query's logits so far.
        row_sum: (queries,), the sum of each query's weights so far.
        out: (queries, BD), the weighted sum of values so far.

    Returns: the new `row_max`, `row_sum` and `out`.
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

"""Attention's backward: one launch computes the gradients, a second sums the bias table's gradient.

The first launch has three kinds of programs: one computes the gradient of q for a tile of queries,
one the gradients of k and v for a tile of keys, and one the gradient of the bias table, which is
summed over windows in a fixed order in registers. Programs run head by head, so that the inputs
that the three kinds share stay in the cache.

The table's gradient has two stages and no atomics. A tile of the first stage pairs rows of a window
with rows of the same window, so that along a diagonal of tiles all sums belong to the same offsets.
For windows of w columns, the first stage stores a few (w, w) blocks for each offset of rows, and
the second stage sums these blocks in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fd_large.kernels.window_attention_triton import (
    EPS,
    LOG2_E,
    PENALTY,
    add_bias,
    dot,
    load_keys,
    load_queries,
    narrowed,
    output_terms,
    place,
    softmax_gradient,
)


@triton.jit
def _through_unit(gradient, unit, factor, COSINE: tl.constexpr):
    """Returns the gradients of vectors, from the gradients of the vectors scaled to norm 1.

    Args:
        gradient: (tokens, BD), the gradients of the scaled vectors.
        unit: (tokens, BD), the scaled vectors.
        factor: (tokens,), the factors by which the vectors were scaled.
        COSINE: Whether attention scales vectors; if False, `gradient` is returned unchanged.
    """
    if COSINE:
        along = tl.where(factor < 1.0 / EPS, tl.sum(gradient * unit, 1), 0.0)
        gradient = (gradient - unit * along[:, None]) * factor[:, None]
    return gradient


@triton.jit
def _backward_keys(
    number, total, excess, cosine, q, dout, lse, delta, number_i, offset_i, region_i, QKV, TABLE,
    scale, head, window, H, W, C,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Adds the part of the keys `number` to the gradient of one tile of queries.

    Args:
        number: (keys,), indices of the keys in the window.
        total: (queries, BD), the gradient of q so far, divided by scale.
        excess: (queries,), the sum of the gradients of each query's logits so far. Over all keys
            this sum is 0 in exact arithmetic. It is needed for the scale's gradient.
        cosine: (queries,), the sum of each query's cosines so far, weighted by the softmax. It is
            needed for the scale's gradient.
        q: (queries, BD), the queries, of norm 1 if COSINE is true.
        dout: (queries, BD), the gradient of the output.
        lse: (queries,), log2 of the denominator of each query's softmax.
        delta: (queries,), third result of `output_terms`.

    Returns: the new `total`, `excess` and `cosine`; the last two change only if COSINE is true.
    """
    _, inside, offset, region, k, v, factor = load_keys(
        number, QKV, head, window, H, W, C, PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE
    )
    bias = add_bias(
        0.0, TABLE, number_i[:, None], number[None, :], offset_i[:, None], offset[None, :],
        region_i[:, None], region[None, :], PREFIX, WH, WW, SHIFT,
    )  # fmt: skip
    product, weight, dlogits = softmax_gradient(
        q, k, dout, v, (factor * scale)[None, :], bias, lse[:, None], delta[:, None],
        inside[None, :], INTERPRETED,
    )  # fmt: skip
    if COSINE:
        excess += tl.sum(dlogits, 1)
        cosine += tl.sum(weight * product * factor[None, :], 1)
    dlogits = narrowed(dlogits * factor[None, :], k.dtype, INTERPRETED)
    return total + dot(dlogits, k, INTERPRETED), excess, cosine


@triton.jit
def _backward_queries(
    number, dk, dv, k, v, scale, key_inside, number_j, offset_j, region_j, QKV, BIAS, TABLE, OUT,
    DOUT, LSE, rows, head, window, H, W, C,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Adds the part of the queries `number` to the gradients of one tile of keys and values.

    The keys are the rows of the computed tile of logits, and the queries its columns.

    Args:
        number: (queries,), indices of the queries in the window.
        dk: (keys, BD), the gradient of the scaled keys so far, divided by the logits' scale.
        dv: (keys, BD), the gradient of v so far.
        k: (keys, BD), the keys as stored.
        v: (keys, BD), the values.
        scale: (keys,), the factor of each key's logits, times log2(e).
        key_inside: (keys,), whether the key exists.

    Returns: the new `dk` and `dv`.
    """
    row, inside, offset, region, q, _ = load_queries(
        number, QKV, BIAS, head, window, H, W, C, PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE
    )
    q = narrowed(q, k.dtype, INTERPRETED)
    dout, lse, delta = output_terms(row, inside, BIAS, OUT, DOUT, LSE, rows, head, C, D, BD)
    bias = add_bias(
        0.0, TABLE, number[None, :], number_j[:, None], offset[None, :], offset_j[:, None],
        region[None, :], region_j[:, None], PREFIX, WH, WW, SHIFT,
    )  # fmt: skip
    _, weight, dlogits = softmax_gradient(
        k, q, v, dout, scale[:, None], bias, lse[None, :], delta[None, :], key_inside[:, None],
        INTERPRETED,
    )  # fmt: skip
    dv += dot(narrowed(weight, k.dtype, INTERPRETED), dout, INTERPRETED)
    dk += dot(narrowed(dlogits, k.dtype, INTERPRETED), q, INTERPRETED)
    return dk, dv


@triton.jit
def _store(
    gradient, DQKV, row, inside, column, stride,
    D: tl.constexpr, BD: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    d = tl.arange(0, BD)
    at = row[:, None] * stride + (column + d)[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(DQKV + at, narrowed(gradient, DQKV.dtype.element_ty, INTERPRETED), mask=mask)


@triton.jit
def _query_part(
    part, head, QKV, BIAS, TABLE, scale, OUT, DOUT, LSE, DQKV, DBIAS, DSCALE, rows, H, W, heads,
    windows, chunks,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of q, bias and scale for one tile of queries in several windows.

    `part` is the number of a program. With T tiles in a window, the program takes tile `part` % T
    of every `chunks`-th window of the batch, from window `part` // T on. The gradient of q is
    written to DQKV; the partial sums for bias and scale are written to DBIAS and DSCALE.
    """
    N: tl.constexpr = PREFIX + WH * WW
    TILES: tl.constexpr = (N + TILE - 1) // TILE
    dtype: tl.constexpr = QKV.dtype.element_ty
    C = heads * D
    number = part % TILES * TILE + tl.arange(0, TILE)
    dq_sum = tl.zeros([BD], tl.float32)
    dout_sum = tl.zeros([BD], tl.float32)
    dscale = tl.zeros([TILE], tl.float32)
    for window in range(part // TILES, windows, chunks):
        row, inside, offset, region, q, factor = load_queries(
            number, QKV, BIAS, head, window, H, W, C, PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE
        )
        dout, lse, delta = output_terms(row, inside, BIAS, OUT, DOUT, LSE, rows, head, C, D, BD)
        narrow = narrowed(q, dtype, INTERPRETED)
        total = tl.zeros([TILE, BD], tl.float32)
        excess = tl.zeros([TILE], tl.float32)
        cosine = tl.zeros([TILE], tl.float32)
        for first in range(0, N, STEP):
            total, excess, cosine = _backward_keys(
                first + tl.arange(0, STEP), total, excess, cosine, narrow, dout, lse, delta,
                number, offset, region, QKV, TABLE, scale * LOG2_E, head, window, H, W, C,
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
    part, head, QKV, BIAS, TABLE, scale, OUT, DOUT, LSE, DQKV, rows, H, W, heads, windows, chunks,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Computes the gradients of k and v for one tile of keys in several windows.

    `part` is the number of a program. With T tiles in a window, the program takes tile `part` % T
    of every `chunks`-th window of the batch, from window `part` // T on. The gradients are written
    to DQKV.
    """
    N: tl.constexpr = PREFIX + WH * WW
    TILES: tl.constexpr = (N + TILE - 1) // TILE
    C = heads * D
    number = part % TILES * TILE + tl.arange(0, TILE)
    for window in range(part // TILES, windows, chunks):
        row, inside, offset, region, k, v, factor = load_keys(
            number, QKV, head, window, H, W, C, PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE
        )
        scales = factor * (scale * LOG2_E)
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
    """Returns for each place of a block the index of the window's token that has this place.

    A block is SLOTS // ROW consecutive rows of the window, each padded to ROW places, or the prefix
    tokens.

    Args:
        block: Number of the block, from 0. The number `blocks` stands for the prefix tokens.
        blocks: Number of blocks of rows in a window.
        PREFIX: Number of prefix tokens.
        WH: Rows of a window.
        WW: Columns of a window.
        ROW: Number of places for a row of the window.
        SLOTS: Number of places in a block.

    Returns: (SLOTS,); a place without a token gets an index past the last token.
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
    part, head, QKV, BIAS, TABLE, scale, OUT, DOUT, LSE, PARTS, rows, H, W, heads, windows, groups,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr, SLOTS: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
    """Computes the table's gradient on one diagonal of tiles, summed over several windows.

    A tile pairs a block of queries with a block of keys of the same window. The tiles (I, I - d)
    make a diagonal, and the gradient is summed along the diagonal and over the windows. With a
    prefix, the tiles that pair prefix with patches, patches with prefix, and prefix with prefix
    count as three more diagonals.

    `part` is the number of a program. With D diagonals, the program takes diagonal `part` % D of
    every `groups`-th window of the batch, from window `part` // D on. The sums are written to
    PARTS.
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
    offset_i = place(number_i, 0, H, W, PREFIX, WH, WW, 0, False)[2]
    offset_j = place(number_j, 0, H, W, PREFIX, WH, WW, 0, False)[2]
    position = add_bias(
        0.0, TABLE, number_i[:, None], number_j[None, :], offset_i[:, None], offset_j[None, :],
        0, 0, PREFIX, WH, WW, 0,
    )  # fmt: skip
    total = tl.zeros([SLOTS, SLOTS], tl.float32)
    for window in range(group, windows, groups):
        for n in range(count):
            number_i = _slots(first_i + n * step_i, BLOCKS, PREFIX, WH, WW, ROW, SLOTS)
            number_j = _slots(first_j + n * step_j, BLOCKS, PREFIX, WH, WW, ROW, SLOTS)
            row, inside, _, region_i, q, _ = load_queries(
                number_i, QKV, BIAS, head, window, H, W, C,
                PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE,
            )  # fmt: skip
            dout, lse, delta = output_terms(row, inside, BIAS, OUT, DOUT, LSE, rows, head, C, D, BD)
            _, inside, _, region_j, k, v, factor = load_keys(
                number_j, QKV, head, window, H, W, C,
                PREFIX, WH, WW, SHIFT, PADDED, D, BD, COSINE,
            )  # fmt: skip
            bias = position
            if SHIFT > 0:
                bias = position + tl.where(region_i[:, None] != region_j[None, :], PENALTY, 0.0)
            _, _, dlogits = softmax_gradient(
                narrowed(q, k.dtype, INTERPRETED), k, dout, v, (factor * (scale * LOG2_E))[None, :],
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
    QKV, BIAS, TABLE, SCALE, OUT, DOUT, LSE, DQKV, DBIAS, DSCALE, PARTS, rows, H, W, heads, windows,
    chunks, groups,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, SLOTS: tl.constexpr,
    ROW: tl.constexpr,
):  # fmt: skip
    """Computes a part of the gradients of one head.

    The number of the program decides the head, and whether the part is of the gradient of the
    position table, of keys and values, or of queries. The gradients of queries, keys and values are
    written to DQKV. DBIAS (biases), DSCALE (logits' scale) and PARTS (position table) receive
    partial sums.
    """
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
def gather_table(
    PARTS, DTABLE, heads, groups,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SLOTS: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sums PARTS to the gradient DTABLE of the position bias, for the offsets between patches.

    An offset's partial sums are added over the groups of windows, then over the diagonals of tiles
    (two at most), then over the key's column. The order is fixed, so that the sums are
    reproducible. Rows of the table for prefix tokens are not written.
    """
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

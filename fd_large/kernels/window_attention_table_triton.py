"""The gradient of attention's bias table, in two stages and without atomics.

Its tiles pair rows of a window with rows of the same window, so that along a diagonal of tiles all
sums belong to the same offsets; what is stored is some (w, w) blocks an offset of rows, which a
second kernel gathers in a fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fd_large.kernels.window_attention_tiles_triton import (
    LOG2_E,
    PENALTY,
    add_bias,
    load_keys,
    load_queries,
    narrowed,
    output_terms,
    place,
    softmax_gradient,
)


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
def table_part(
    part, head, QKV, BIAS, TABLE, scale, OUT, DOUT, LSE, PARTS, rows, H, W, heads, windows, groups,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SHIFT: tl.constexpr,
    PADDED: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, COSINE: tl.constexpr,
    INTERPRETED: tl.constexpr, SLOTS: tl.constexpr, ROW: tl.constexpr,
):  # fmt: skip
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
def gather_table(
    PARTS, DTABLE, heads, groups,
    PREFIX: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, SLOTS: tl.constexpr,
    ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
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

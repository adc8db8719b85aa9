"""Triton kernels of `residual_norm.py` and `add_norm.py`.

A program works on tiles of a few rows and all channels. Channels are padded to a power of 2, and
the padding is masked. Every kernel widens to float32 right after a load and rounds once at a store.
For gradients of per-channel vectors, each of at most PARTIALS programs sums its rows in a fixed
order and stores one partial row; torch then sums these rows, in a fixed order too. There are no
atomics, so results are reproducible to the bit. The launches are in `residual_norm.py` and
`add_norm.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(rows, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, number):
    """Returns where the elements of a tile lie in a tensor (rows, C).

    Args:
        rows: Number of rows of the tensor.
        C: Number of channels, which are the columns of the tensor.
        ROWS: Number of rows in a tile.
        BLOCK: C, rounded up to a power of 2.
        number: Number of the tile, from 0.

    Returns: the row numbers (ROWS,), the mask of existing rows (ROWS,), the offsets of the elements
        (ROWS, BLOCK), and the mask of existing elements (ROWS, BLOCK).
    """
    row = number * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = row < rows
    at = row.to(tl.int64)[:, None] * C + channel[None, :]
    return row, inside, at, inside[:, None] & (channel < C)[None, :]


@triton.jit
def _vector(POINTER, C: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    values = tl.load(POINTER + channel, mask=channel < C, other=0.0)
    return values.to(tl.float32)[None, :]


@triton.jit
def standardise(values, eps, mask, C: tl.constexpr):
    """Scales and shifts each row of a tile to mean 0 and variance 1.

    Args:
        values: (ROWS, BLOCK) float32, where elements outside of `mask` are 0.
        eps: Added to the variance.
        mask: (ROWS, BLOCK), the existing elements.
        C: Number of existing channels of a row.

    Returns: the rows (ROWS, BLOCK), 0 outside of `mask`; the mean of each row of `values`, (ROWS,);
        1/deviation of each row, (ROWS,).
    """
    mean = tl.sum(values, 1) / C
    centred = tl.where(mask, values - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def _norm_gradient(weighted, normed, rstd, C: tl.constexpr):
    """Returns the gradient of a LayerNorm's input, (ROWS, BLOCK) float32.

    Args:
        weighted: (ROWS, BLOCK), the gradient of the LayerNorm's output times the LayerNorm's
            weight.
        normed: (ROWS, BLOCK), the input scaled and shifted to mean 0 and variance 1.
        rstd: (ROWS,), 1/deviation of each row of the input.
        C: Number of existing channels of a row.
    """
    along = tl.sum(weighted * normed, 1) / C
    centred = weighted - (tl.sum(weighted, 1) / C)[:, None] - normed * along[:, None]
    return centred * rstd[:, None]


@triton.jit
def _residual_norm_forward(
    X, BRANCH, WEIGHT, BIAS, BRANCH_BIAS, SCALE, Y, COPY, MEAN, RSTD, rows, rows_per_sample, eps,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, inside, at, mask = locate(rows, C, ROWS, BLOCK, tl.program_id(0))
    branch = tl.load(BRANCH + at, mask=mask, other=0.0).to(tl.float32)
    if BRANCH_BIAS is not None:
        branch += _vector(BRANCH_BIAS, C, BLOCK)
    normed, mean, rstd = standardise(branch, eps, mask, C)
    y = normed * _vector(WEIGHT, C, BLOCK) + _vector(BIAS, C, BLOCK)
    if SCALE is not None:
        y *= tl.load(SCALE + row // rows_per_sample, mask=inside, other=0.0)[:, None]
    if X is not None:
        y += tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)
    if COPY is not None:
        tl.store(COPY + at, y.to(COPY.dtype.element_ty), mask=mask)
    tl.store(MEAN + row, mean, mask=inside)
    tl.store(RSTD + row, rstd, mask=inside)


@triton.jit
def _residual_norm_backward(
    DY, DCOPY, BRANCH, WEIGHT, BRANCH_BIAS, SCALE, MEAN, RSTD, DX, DBRANCH, DWEIGHT, DBIAS,
    DBRANCH_BIAS, rows, rows_per_sample, tiles, programs,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    weight = _vector(WEIGHT, C, BLOCK)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    dlast = tl.zeros([ROWS, BLOCK], tl.float32)
    for number in tl.range(program, tiles, programs, num_stages=STAGES):
        row, inside, at, mask = locate(rows, C, ROWS, BLOCK, number)
        branch = tl.load(BRANCH + at, mask=mask, other=0.0).to(tl.float32)
        if BRANCH_BIAS is not None:
            branch += _vector(BRANCH_BIAS, C, BLOCK)
        if DY is not None:
            dy = tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
            if DCOPY is not None:
                dy += tl.load(DCOPY + at, mask=mask, other=0.0).to(tl.float32)
        else:
            dy = tl.load(DCOPY + at, mask=mask, other=0.0).to(tl.float32)
        if DX is not None:
            tl.store(DX + at, dy.to(DX.dtype.element_ty), mask=mask)
        if SCALE is not None:
            dy *= tl.load(SCALE + row // rows_per_sample, mask=inside, other=0.0)[:, None]
        mean = tl.load(MEAN + row, mask=inside, other=0.0)
        rstd = tl.load(RSTD + row, mask=inside, other=0.0)
        normed = tl.where(mask, (branch - mean[:, None]) * rstd[:, None], 0.0)
        dweight += dy * normed
        dbias += dy
        dbranch = _norm_gradient(dy * weight, normed, rstd, C)
        if BRANCH_BIAS is not None:
            dlast += dbranch
        tl.store(DBRANCH + at, dbranch.to(DBRANCH.dtype.element_ty), mask=mask)
    channel = tl.arange(0, BLOCK)
    tl.store(DWEIGHT + program * C + channel, tl.sum(dweight, 0), mask=channel < C)
    tl.store(DBIAS + program * C + channel, tl.sum(dbias, 0), mask=channel < C)
    if BRANCH_BIAS is not None:
        tl.store(DBRANCH_BIAS + program * C + channel, tl.sum(dlast, 0), mask=channel < C)


@triton.jit
def _add_norm_forward(
    X, BRANCH, GAMMA, SCALE, WEIGHT, BIAS, Y, NORMED, MEAN, RSTD, rows, rows_per_sample, eps,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, inside, at, mask = locate(rows, C, ROWS, BLOCK, tl.program_id(0))
    y = tl.load(BRANCH + at, mask=mask, other=0.0).to(tl.float32)
    if GAMMA is not None:
        y *= _vector(GAMMA, C, BLOCK)
    if SCALE is not None:
        y *= tl.load(SCALE + row // rows_per_sample, mask=inside, other=0.0)[:, None]
    y += tl.load(X + at, mask=mask, other=0.0).to(tl.float32)
    stored = y.to(Y.dtype.element_ty)
    tl.store(Y + at, stored, mask=mask)
    if NORMED is not None:
        # The norm of the sum as stored, because that is what the backward reads.
        normed, mean, rstd = standardise(stored.to(tl.float32), eps, mask, C)
        normed = normed * _vector(WEIGHT, C, BLOCK) + _vector(BIAS, C, BLOCK)
        tl.store(NORMED + at, normed.to(NORMED.dtype.element_ty), mask=mask)
        tl.store(MEAN + row, mean, mask=inside)
        tl.store(RSTD + row, rstd, mask=inside)


@triton.jit
def _add_norm_backward(
    DY, DNORMED, Y, BRANCH, GAMMA, SCALE, WEIGHT, MEAN, RSTD, DX, DBRANCH, DGAMMA, DWEIGHT, DBIAS,
    rows, rows_per_sample, tiles, programs,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    channel = tl.arange(0, BLOCK)
    dgamma = tl.zeros([ROWS, BLOCK], tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    dbias = tl.zeros([ROWS, BLOCK], tl.float32)
    for number in tl.range(program, tiles, programs, num_stages=STAGES):
        row, inside, at, mask = locate(rows, C, ROWS, BLOCK, number)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        if DY is not None:
            total += tl.load(DY + at, mask=mask, other=0.0).to(tl.float32)
        if DNORMED is not None:
            dnormed = tl.load(DNORMED + at, mask=mask, other=0.0).to(tl.float32)
            y = tl.load(Y + at, mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(MEAN + row, mask=inside, other=0.0)
            rstd = tl.load(RSTD + row, mask=inside, other=0.0)
            normed = tl.where(mask, (y - mean[:, None]) * rstd[:, None], 0.0)
            dweight += dnormed * normed
            dbias += dnormed
            total += _norm_gradient(dnormed * _vector(WEIGHT, C, BLOCK), normed, rstd, C)
            tl.store(DX + at, total.to(DX.dtype.element_ty), mask=mask)
        if SCALE is not None:
            total *= tl.load(SCALE + row // rows_per_sample, mask=inside, other=0.0)[:, None]
        if GAMMA is not None:
            dgamma += total * tl.load(BRANCH + at, mask=mask, other=0.0).to(tl.float32)
            total *= _vector(GAMMA, C, BLOCK)
        tl.store(DBRANCH + at, total.to(DBRANCH.dtype.element_ty), mask=mask)
    if GAMMA is not None:
        tl.store(DGAMMA + program * C + channel, tl.sum(dgamma, 0), mask=channel < C)
    if DNORMED is not None:
        tl.store(DWEIGHT + program * C + channel, tl.sum(dweight, 0), mask=channel < C)
        tl.store(DBIAS + program * C + channel, tl.sum(dbias, 0), mask=channel < C)

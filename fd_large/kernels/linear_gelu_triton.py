"""Triton kernels of `linear_gelu.py`; a tile is some rows by some channels.

In the backward a program walks over every n-th tile of rows of its channels, sums the gradient of
the bias on the way and stores one partial row. torch adds these in a fixed order: there are no
atomics, and the bits are the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fd_large.kernels.residual_norm_triton import on_device

_ROWS, _COLUMNS = 8, 512
# Two for each multiprocessor of an H100.
_PROGRAMS = 264


@triton.jit
def _tile(number, rows, C: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, columns):
    """Returns offsets and mask of a tile, (ROWS, COLUMNS)."""
    row = number * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * C + columns[None, :]
    return at, (row < rows)[:, None] & (columns < C)[None, :]


@triton.jit
def _share(z, QUICK: tl.constexpr):
    """Returns the factor of z: the normal distribution function, or the sigmoid in its place."""
    return tl.sigmoid(1.702 * z) if QUICK else 0.5 + 0.5 * tl.erf(z * 0.7071067811865476)


@triton.jit
def _forward(
    PRODUCT, BIAS, OUT, rows,
    C: tl.constexpr, QUICK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(BIAS + columns, mask=columns < C, other=0.0).to(tl.float32)
    at, mask = _tile(tl.program_id(0), rows, C, ROWS, COLUMNS, columns)
    z = tl.load(PRODUCT + at, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
    out = z * _share(z, QUICK)
    tl.store(OUT + at, out.to(OUT.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    DOUT, PRODUCT, BIAS, DPRODUCT, DBIAS, rows, tiles, programs,
    C: tl.constexpr, QUICK: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = tl.load(BIAS + columns, mask=columns < C, other=0.0).to(tl.float32)
    dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    for number in tl.range(tl.program_id(0), tiles, programs, num_stages=3):
        at, mask = _tile(number, rows, C, ROWS, COLUMNS, columns)
        z = tl.load(PRODUCT + at, mask=mask, other=0.0).to(tl.float32) + bias[None, :]
        dout = tl.load(DOUT + at, mask=mask, other=0.0).to(tl.float32)
        share = _share(z, QUICK)
        if QUICK:
            density = 1.702 * share * (1.0 - share)
        else:
            density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        gradient = dout * (share + z * density)
        dbias += gradient
        tl.store(DPRODUCT + at, gradient.to(DPRODUCT.dtype.element_ty), mask=mask)
    at = tl.program_id(0) * C + columns
    tl.store(DBIAS + at, tl.sum(dbias, 0), mask=columns < C)


def forward(product: Tensor, bias: Tensor, quick: bool) -> Tensor:
    """Launches; arguments and results as of the operation `fd_large::bias_gelu`."""
    out = product.new_empty(product.shape)
    rows, width = product.numel() // len(bias), len(bias)
    with on_device(product):
        _forward[(triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS))](
            product, bias, out, rows, C=width, QUICK=quick, **_constants()
        )
    return out


def backward(dout: Tensor, product: Tensor, bias: Tensor, quick: bool) -> tuple[Tensor, Tensor]:
    """Launches; arguments and results as of `fd_large::bias_gelu_backward`."""
    rows, width = product.numel() // len(bias), len(bias)
    tiles, blocks = triton.cdiv(rows, _ROWS), triton.cdiv(width, _COLUMNS)
    programs = min(tiles, triton.cdiv(_PROGRAMS, blocks))
    dproduct = product.new_empty(product.shape)
    dbias = bias.new_empty(programs, width, dtype=torch.float32)
    with on_device(product):
        _backward[(programs, blocks)](
            dout, product, bias, dproduct, dbias, rows, tiles, programs,
            C=width, QUICK=quick, **_constants(),
        )  # fmt: skip
    return dproduct, dbias.sum(0).to(bias.dtype)


def _constants() -> dict[str, int]:
    return {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "num_warps": 8}

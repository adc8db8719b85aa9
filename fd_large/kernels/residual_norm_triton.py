"""Triton kernels of `residual_norm.py`; a tile is some rows by all channels.

Channels are padded to a power of 2, and the padding is masked. Every kernel widens to float32 right
after a load and rounds once at a store. For gradients of per-channel vectors, each of at most
PARTIALS programs sums its rows in a fixed order and stores one partial row; torch then sums these
rows, in a fixed order too. There are no atomics, and the bits are the same every time.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

# About one program for each of an H100's 132 multiprocessors. A backward has as many programs as
# partial rows, and fewer would leave memory bandwidth unused.
PARTIALS = 128
# Elements of a tile, 16 per thread, unless a row is longer.
_TILE = 4096


def tile(width: int) -> dict[str, int]:
    """Returns the constants of a launch for rows of `width` channels, 32 to 8192."""
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    return {"C": width, "ROWS": rows, "BLOCK": block, "num_warps": rows * block // 512}


@triton.jit
def locate(rows, C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, number):
    """Returns offsets and masks of a tile: (ROWS,), (ROWS,), (ROWS, BLOCK), (ROWS, BLOCK)."""
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
    """Returns rows with mean 0 and variance 1 (0 outside of the mask), mean and 1/deviation."""
    mean = tl.sum(values, 1) / C
    centred = tl.where(mask, values - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def _norm_gradient(weighted, normed, rstd, C: tl.constexpr):
    """Returns the gradient of a norm's input, from that of its output times the weight."""
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


def residual_norm_forward(
    x: Tensor | None,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    copy: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches; arguments and results as of the operation `fd_large::residual_norm`."""
    width, rows = branch.shape[-1], _rows(branch)
    y = torch.empty_like(branch, dtype=dtype)
    narrow = branch.new_empty(0) if copy is None else torch.empty_like(branch, dtype=copy)
    mean, rstd = (branch.new_empty(rows, dtype=torch.float32) for _ in range(2))
    constants = tile(width)
    with on_device(branch):
        _residual_norm_forward[(triton.cdiv(rows, constants["ROWS"]),)](
            x, branch, weight, bias, branch_bias, scale, y, None if copy is None else narrow, mean,
            rstd, rows, rows // branch.shape[0], eps,
            **constants,
        )  # fmt: skip
    return y, narrow, mean, rstd


def residual_norm_backward(
    dy: Tensor | None,
    dcopy: Tensor | None,
    branch: Tensor,
    weight: Tensor,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches; arguments and results as of `fd_large::residual_norm_backward`."""
    width, rows = branch.shape[-1], _rows(branch)
    total = branch.new_empty(0) if dx is None else torch.empty_like(branch, dtype=dx)
    dbranch = torch.empty_like(branch)
    constants, loop, programs = _loop(rows, width)
    dweight, dbias = (branch.new_empty(programs, width, dtype=torch.float32) for _ in range(2))
    dlast = None if branch_bias is None else torch.empty_like(dweight)
    with on_device(branch):
        _residual_norm_backward[(programs,)](
            dy, dcopy, branch, weight, branch_bias, scale, mean, rstd,
            None if dx is None else total, dbranch, dweight, dbias, dlast, rows,
            rows // branch.shape[0], *loop,
            **constants,
        )  # fmt: skip
    last = branch.new_empty(0) if dlast is None else _summed(dlast, branch_bias)
    return total, dbranch, _summed(dweight, weight), _summed(dbias, weight), last


def add_norm_forward(
    x: Tensor,
    branch: Tensor,
    gamma: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches; arguments and results as of the operation `fd_large::add_norm`."""
    width, rows = x.shape[-1], _rows(x)
    y = torch.empty_like(x)
    if weight is None:
        normed = x.new_empty(0)
        mean, rstd = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
    else:
        normed = torch.empty_like(x, dtype=dtype)
        mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    constants = tile(width)
    with on_device(x):
        _add_norm_forward[(triton.cdiv(rows, constants["ROWS"]),)](
            x, branch, gamma, scale, weight, bias, y, None if weight is None else normed, mean,
            rstd, rows, rows // x.shape[0], eps,
            **constants,
        )  # fmt: skip
    return y, normed, mean, rstd


def add_norm_backward(
    dy: Tensor | None,
    dnormed: Tensor | None,
    y: Tensor | None,
    branch: Tensor | None,
    gamma: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launches; arguments and results as of `fd_large::add_norm_backward`."""
    like = dy if dnormed is None else dnormed
    width, rows = like.shape[-1], _rows(like)
    total = like.new_empty(0) if dnormed is None else torch.empty_like(y)
    dbranch = torch.empty_like(like, dtype=dtype)
    constants, loop, programs = _loop(rows, width, gamma is not None)
    vectors = (gamma, *(None if dnormed is None else weight for _ in range(2)))
    partials = [None if v is None else mean.new_empty(programs, width) for v in vectors]
    with on_device(like):
        _add_norm_backward[(programs,)](
            dy, dnormed, y, branch, gamma, scale, weight, mean, rstd,
            None if dnormed is None else total, dbranch, *partials, rows, rows // like.shape[0],
            *loop,
            **constants,
        )  # fmt: skip
    sums = (
        mean.new_empty(0) if v is None else _summed(p, v)
        for p, v in zip(partials, vectors, strict=True)
    )
    return total, dbranch, *sums


def _rows(values: Tensor) -> int:
    return values.numel() // values.shape[-1]


def _loop(
    rows: int, width: int, layer_scale: bool = False
) -> tuple[dict[str, int], tuple[int, int], int]:
    """Returns the constants of a backward, its (tiles, programs), and the programs as its grid."""
    constants = tile(width)
    if width % 8:
        # Rows that cannot be loaded in vectors take more registers for addresses.
        constants["ROWS"] = max(1, constants["ROWS"] // 2)
    # The next tiles are loaded while one is worked on, as far as shared memory (163 KB on an A100)
    # and registers allow. With LayerScale four maps are loaded, else three.
    stages = 3 if constants["BLOCK"] <= (_TILE // 2 if layer_scale else _TILE) else 2
    constants["STAGES"] = stages if constants["BLOCK"] <= _TILE else 1
    # Twice the threads of a forward, because sums per channel stay in registers from tile to tile;
    # all registers that so many threads can have, because the compiler spills rather than use more
    # than half.
    constants["num_warps"], constants["maxnreg"] = 16, 128
    tiles = triton.cdiv(rows, constants["ROWS"])
    programs = min(PARTIALS, tiles)
    return constants, (tiles, programs), programs


def _summed(partials: Tensor, like: Tensor) -> Tensor:
    return partials.sum(0).to(like.dtype)


def on_device(values: Tensor) -> AbstractContextManager:
    """Selects the tensors' GPU, because a launch takes the current one."""
    return torch.cuda.device(values.device) if values.is_cuda else nullcontext()

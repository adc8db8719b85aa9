"""Launches of the kernels of `residual_norm.py`, and their gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fd_large.kernels.operation import blocks, contiguous, launch, operation

# About one program for each of an H100's 132 multiprocessors. A backward has as many programs as
# partial rows, and fewer would leave memory bandwidth unused.
PARTIALS = 128
# Elements of a tile, 16 per thread, unless a row is longer.
_TILE = 4096


def tile(width: int) -> dict[str, int]:
    """Returns the constants of a launch for rows of `width` channels, 32 to 8192."""
    block = 1 << (int(width) - 1).bit_length()
    rows = max(1, _TILE // block)
    return {"C": int(width), "ROWS": rows, "BLOCK": block, "num_warps": rows * block // 512}


@operation("residual_norm")
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
    """x + scale * norm(branch + branch_bias) in `dtype` and in `copy`, and the rows' statistics.

    Without x and scale it is LayerNorm. The statistics are the mean and 1/deviation.
    """
    width, rows = branch.shape[-1], _rows(branch)
    y = torch.empty_like(branch, dtype=dtype)
    narrow = branch.new_empty(0) if copy is None else torch.empty_like(branch, dtype=copy)
    mean, rstd = (branch.new_empty(rows, dtype=torch.float32) for _ in range(2))
    constants = tile(width)
    launch(
        "residual_norm_triton._residual_norm_forward", (blocks(rows, constants["ROWS"]),),
        x, branch, weight, bias, branch_bias, scale, y, None if copy is None else narrow, mean,
        rstd, rows, rows // branch.shape[0], eps,
        **constants,
    )  # fmt: skip
    return y, narrow, mean, rstd


@operation("residual_norm_backward")
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
    """dy + dcopy in `dx`, and the gradients of branch, weight, bias and branch_bias."""
    width, rows = branch.shape[-1], _rows(branch)
    total = branch.new_empty(0) if dx is None else torch.empty_like(branch, dtype=dx)
    dbranch = torch.empty_like(branch)
    constants, loop, programs = _loop(rows, width)
    dweight, dbias = (branch.new_empty(programs, width, dtype=torch.float32) for _ in range(2))
    dlast = None if branch_bias is None else torch.empty_like(dweight)
    launch(
        "residual_norm_triton._residual_norm_backward", (programs,),
        dy, dcopy, branch, weight, branch_bias, scale, mean, rstd,
        None if dx is None else total, dbranch, dweight, dbias, dlast, rows,
        rows // branch.shape[0], *loop,
        **constants,
    )  # fmt: skip
    last = branch.new_empty(0) if dlast is None else _summed(dlast, branch_bias)
    return total, dbranch, _summed(dweight, weight), _summed(dbias, weight), last


def _residual_norm_setup(ctx, inputs, output):
    x, branch, weight, _, branch_bias, scale, _, _, _ = inputs
    _, narrow, mean, rstd = output
    ctx.save_for_backward(branch, weight, branch_bias, scale, mean, rstd)
    ctx.stream = None if x is None else x.dtype
    ctx.mark_non_differentiable(mean, rstd, *(() if narrow.numel() else (narrow,)))
    # Otherwise an unused copy would cost a map of zeros.
    ctx.set_materialize_grads(False)


def _residual_norm_gradients(ctx, dy, dcopy, _mean, _rstd):
    if dy is None and dcopy is None:
        return (None,) * 9
    branch, weight, branch_bias, scale, mean, rstd = ctx.saved_tensors
    dy, dcopy = contiguous(dy), contiguous(dcopy)
    # The gradient of a sum is that of its terms; it is written only if two gradients meet.
    summed = dcopy is not None and ctx.stream is not None
    total, dbranch, dweight, dbias, dlast = residual_norm_backward(
        dy, dcopy, branch, weight, branch_bias, scale, mean, rstd, ctx.stream if summed else None
    )
    dx = None if ctx.stream is None else total if summed else dy
    return dx, dbranch, dweight, dbias, None if branch_bias is None else dlast, *(None,) * 4


residual_norm_forward.register_autograd(
    _residual_norm_gradients, setup_context=_residual_norm_setup
)


class Twice(torch.autograd.Function):
    """The operation with one result in two tensors over the same memory.

    Their gradients are then summed in the backward kernel; those of one tensor used twice would be
    summed in a pass of their own. A custom operation may not return such a pair.
    """

    @staticmethod
    def forward(ctx, *inputs):
        """Takes and returns what the operation does, with the sum in place of its copy."""
        y, _, mean, rstd = residual_norm_forward(*inputs)
        output = y, y.detach(), mean, rstd
        _residual_norm_setup(ctx, inputs, output)
        return output

    backward = staticmethod(_residual_norm_gradients)


@operation("add_norm")
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
    """x + scale * gamma * branch, its norm in `dtype`, the rows' mean and 1/deviation.

    Without weight and bias it is the sum alone.
    """
    width, rows = x.shape[-1], _rows(x)
    y = torch.empty_like(x)
    if weight is None:
        normed = x.new_empty(0)
        mean, rstd = (x.new_empty(0, dtype=torch.float32) for _ in range(2))
    else:
        normed = torch.empty_like(x, dtype=dtype)
        mean, rstd = (x.new_empty(rows, dtype=torch.float32) for _ in range(2))
    constants = tile(width)
    launch(
        "residual_norm_triton._add_norm_forward", (blocks(rows, constants["ROWS"]),),
        x, branch, gamma, scale, weight, bias, y, None if weight is None else normed, mean,
        rstd, rows, rows // x.shape[0], eps,
        **constants,
    )  # fmt: skip
    return y, normed, mean, rstd


@operation("add_norm_backward")
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
    """The gradients of x (where it is not dy itself), branch, gamma, weight and bias.

    y goes with dnormed, branch with gamma; `dtype` is that of branch.
    """
    like = dy if dnormed is None else dnormed
    width, rows = like.shape[-1], _rows(like)
    total = like.new_empty(0) if dnormed is None else torch.empty_like(y)
    dbranch = torch.empty_like(like, dtype=dtype)
    constants, loop, programs = _loop(rows, width, gamma is not None)
    vectors = (gamma, *(None if dnormed is None else weight for _ in range(2)))
    partials = [None if v is None else mean.new_empty(programs, width) for v in vectors]
    launch(
        "residual_norm_triton._add_norm_backward", (programs,),
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


def _add_norm_setup(ctx, inputs, output):
    _, branch, gamma, scale, weight, _, _, _ = inputs
    y, normed, mean, rstd = output
    ctx.save_for_backward(
        None if weight is None else y,
        None if gamma is None else branch,
        gamma,
        scale,
        weight,
        mean,
        rstd,
    )
    ctx.branch = branch.dtype
    ctx.mark_non_differentiable(mean, rstd, *((normed,) if weight is None else ()))
    ctx.set_materialize_grads(False)


def _add_norm_gradients(ctx, dy, dnormed, _mean, _rstd):
    if dy is None and dnormed is None:
        return (None,) * 8
    y, branch, gamma, scale, weight, mean, rstd = ctx.saved_tensors
    dy, dnormed = contiguous(dy), contiguous(dnormed)
    dx, dbranch, dgamma, dweight, dbias = add_norm_backward(
        dy, dnormed, y, branch, gamma, scale, weight, mean, rstd, ctx.branch
    )
    if dnormed is None:
        dx, dweight, dbias = dy, None, None
    return dx, dbranch, None if gamma is None else dgamma, None, dweight, dbias, None, None


add_norm_forward.register_autograd(_add_norm_gradients, setup_context=_add_norm_setup)


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
    tiles = blocks(rows, constants["ROWS"])
    programs = min(PARTIALS, tiles)
    return constants, (tiles, programs), programs


def _summed(partials: Tensor, like: Tensor) -> Tensor:
    return partials.sum(0).to(like.dtype)

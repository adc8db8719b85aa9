"""Adds a pre-norm branch, x + scale * gamma * branch, and applies the next LayerNorm to the sum.

This file has the structure of `residual_norm.py` and uses that file's LayerNorm. The kernels of
the two files are in `residual_norm_triton.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fd_large.kernels import choose
from fd_large.kernels.check import checked
from fd_large.kernels.operation import blocks, launch, operation, twin
from fd_large.kernels.residual_norm import (
    backward_launch,
    check_stream,
    factors,
    implementation,
    layer_norm,
    layer_norm_reference,
    partial_sums,
    rows_of,
    summed,
    tile,
    untested,
)


@checked
def add_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds a pre-norm branch, y = x + scale * gamma * branch, and applies the next norm to y.

    Args:
        x: (B, ..., C), the residual stream.
        branch: (B, ..., C), any float dtype.
        weight: (C,), weight of the norm.
        bias: (C,), bias of the norm.
        eps: Added to the variance.
        scale: (B,) float32, drop path's factor per sample, takes no gradient; None means 1.
        gamma: (C,), LayerScale; None means 1.
        dtype: Data type of the normalised sum; None for the data type of x.

    Returns: y (B, ..., C) in the dtype of x, and LayerNorm(y) (B, ..., C) in `dtype`.
    Raises: ShapeError: if branch, weight, bias, scale or gamma does not fit the shape of x.
    """
    check_stream("add_norm", x, branch, scale, weight=weight, bias=bias, gamma=gamma)
    dtype = dtype or x.dtype
    case = {"stream": x.dtype, "normed": dtype, "gamma": gamma is not None}
    choice = implementation("add_norm", branch, weight=weight.dtype, **case)
    if choice == "triton":
        return add_norm_forward(x, branch, gamma, factors(scale), weight, bias, eps, dtype)[:2]
    if choice == "compiled":
        norm = twin("add_norm", choice, add_norm_reference, x, branch, scale)
        return norm(x, branch, weight, bias, eps, scale, gamma, dtype)
    y = add_branch_reference(x, branch, scale, gamma)
    # A separate choice, because a norm alone may run where the pair does not.
    return y, layer_norm(y, weight, bias, eps, dtype=dtype)


@checked
def add_branch(
    x: Tensor, branch: Tensor, scale: Tensor | None = None, gamma: Tensor | None = None
) -> Tensor:
    """Adds a pre-norm branch with no norm after it: x + scale * gamma * branch.

    Args:
        x: (B, ..., C), the residual stream.
        branch: (B, ..., C), any float dtype.
        scale: (B,) float32, drop path's factor per sample, takes no gradient; None means 1.
        gamma: (C,), LayerScale; None means 1.

    Returns: (B, ..., C), in the dtype of x.
    Raises: ShapeError: if branch, scale or gamma does not fit the shape of x.
    """
    check_stream("add_branch", x, branch, scale, gamma=gamma)
    case = {"stream": x.dtype, "normed": x.dtype, "gamma": gamma is not None}
    choice = implementation("add_norm", branch, weight=torch.float32, **case)
    if choice == "triton":
        return add_norm_forward(x, branch, gamma, factors(scale), None, None, 0.0, x.dtype)[0]
    add = twin("add_norm", choice, add_branch_reference, x, branch, scale)
    return add(x, branch, scale, gamma)


def add_norm_reference(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    gamma: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Computes `add_norm` in plain torch, with the same arguments and results.

    `dtype` must be given.
    """
    y = add_branch_reference(x, branch, scale, gamma)
    return y, layer_norm_reference(y, weight, bias, eps, dtype)


def add_branch_reference(
    x: Tensor, branch: Tensor, scale: Tensor | None = None, gamma: Tensor | None = None
) -> Tensor:
    """Computes `add_branch` in plain torch, with the same arguments and result.

    The sum is computed in float32 and rounded once.
    """
    branch = branch.to(torch.promote_types(x.dtype, torch.float32))
    if gamma is not None:
        branch = branch * gamma.to(branch.dtype)
    if scale is not None:
        branch = branch * scale.view(-1, *[1] * (x.dim() - 1)).to(branch.dtype)
    return (x + branch).to(x.dtype)


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
    """Returns y = x + scale * gamma * branch, LayerNorm(y), and statistics of y.

    If weight and bias are None, only y is computed, and the other three results are empty.

    Args:
        x: (B, ..., C), the residual stream.
        branch: (B, ..., C), any float dtype.
        gamma: (C,), LayerScale; None means 1.
        scale: (B,) float32, drop path's factor per sample; None means 1.
        weight: (C,), weight of the norm; None without a norm.
        bias: (C,), bias of the norm; None without a norm.
        eps: Added to the variance.
        dtype: Data type of LayerNorm(y).

    Returns: y in the shape and dtype of x; LayerNorm(y) in the shape of x; for each row the mean,
        (rows,) float32; for each row 1/deviation, (rows,) float32. A row is the C channels of a
        token.
    """
    rows, constants = rows_of(x), tile(x.shape[-1])
    y = torch.empty_like(x)
    normed = None if weight is None else torch.empty_like(x, dtype=dtype)
    mean, rstd = (x.new_empty(0 if weight is None else rows, dtype=torch.float32) for _ in range(2))
    launch(
        "residual_norm_triton._add_norm_forward", (blocks(rows, constants["ROWS"]),),
        x, branch, gamma, scale, weight, bias, y, normed, mean, rstd, rows, rows // x.shape[0], eps,
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
    """Returns the gradients of x, branch, gamma, weight and bias.

    Here y = x + scale * gamma * branch. If dnormed is None, the results for x, weight and bias are
    empty; the caller then uses dy, which is the gradient of x. If gamma is None, the result for
    gamma is empty.

    Args:
        dy: (B, ..., C), the gradient of y; None if dnormed is the only gradient.
        dnormed: (B, ..., C), the gradient of LayerNorm(y); None if dy is the only gradient.
        y: (B, ..., C), needed only with dnormed.
        branch: (B, ..., C), needed only with gamma.
        gamma: (C,), LayerScale; None means 1.
        scale: (B,) float32, drop path's factor per sample; None means 1.
        weight: (C,), weight of the norm; None without a norm.
        mean: (rows,) float32, the mean of each row of y.
        rstd: (rows,) float32, 1/deviation of each row of y.
        dtype: Data type of branch, and so of its gradient.
    """
    like = dy if dnormed is None else dnormed
    rows = rows_of(like)
    constants, tiles, programs = backward_launch(rows, like.shape[-1], gamma is not None)
    total = None if dnormed is None else torch.empty_like(y)
    dbranch = torch.empty_like(like, dtype=dtype)
    vectors = (gamma, *(None if dnormed is None else weight for _ in range(2)))
    partials = [partial_sums(programs, vector) for vector in vectors]
    launch(
        "residual_norm_triton._add_norm_backward", (programs,),
        dy, dnormed, y, branch, gamma, scale, weight, mean, rstd, total, dbranch, *partials, rows,
        rows // like.shape[0], tiles, programs,
        **constants,
    )  # fmt: skip
    return total, dbranch, *map(summed, partials, vectors)


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
    _, _, gamma, *_ = saved = ctx.saved_tensors
    dx, dbranch, dgamma, dweight, dbias = add_norm_backward(dy, dnormed, *saved, ctx.branch)
    if dnormed is None:
        dx, dweight, dbias = dy, None, None
    return dx, dbranch, None if gamma is None else dgamma, None, dweight, dbias, None, None


add_norm_forward.register_autograd(_add_norm_gradients, setup_context=_add_norm_setup)
choose.register("add_norm", untested)

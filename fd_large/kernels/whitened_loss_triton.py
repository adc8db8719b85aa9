"""Triton kernels of `whitened_loss.py`; a tile is some rows by all channels.

Forward reads both maps once and stores one partial sum per tile; torch adds these in a fixed order,
so the loss has the same bits every time. Backward reads both maps once more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fd_large.kernels.residual_norm_triton import locate, on_device, standardise, tile


@triton.jit
def _forward(
    STUDENT, TEACHER, PARTIAL, MEAN, RSTD, rows, beta, eps,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, inside, at, mask = locate(rows, C, ROWS, BLOCK, tl.program_id(0))
    student = tl.load(STUDENT + at, mask=mask, other=0.0).to(tl.float32)
    teacher = tl.load(TEACHER + at, mask=mask, other=0.0).to(tl.float32)
    whitened, mean, rstd = standardise(teacher, eps, mask, C)
    # Both are 0 outside of the mask.
    distance = tl.abs(student - whitened)
    loss = tl.where(distance < beta, 0.5 * distance * distance / beta, distance - 0.5 * beta)
    tl.store(PARTIAL + tl.program_id(0), tl.sum(tl.sum(loss, 1), 0))
    tl.store(MEAN + row, mean, mask=inside)
    tl.store(RSTD + row, rstd, mask=inside)


@triton.jit
def _backward(
    DLOSS, STUDENT, TEACHER, MEAN, RSTD, DSTUDENT, rows, elements, beta,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, inside, at, mask = locate(rows, C, ROWS, BLOCK, tl.program_id(0))
    student = tl.load(STUDENT + at, mask=mask, other=0.0).to(tl.float32)
    teacher = tl.load(TEACHER + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(MEAN + row, mask=inside, other=0.0)
    rstd = tl.load(RSTD + row, mask=inside, other=0.0)
    distance = student - (teacher - mean[:, None]) * rstd[:, None]
    slope = tl.minimum(tl.maximum(distance / beta, -1.0), 1.0)
    gradient = slope * (tl.load(DLOSS) / elements)
    tl.store(DSTUDENT + at, gradient.to(DSTUDENT.dtype.element_ty), mask=mask)


def forward(
    student: Tensor, teacher: Tensor, beta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches; arguments and results as of the operation `fd_large::whitened_loss`."""
    constants = tile(student.shape[-1])
    rows = student.numel() // student.shape[-1]
    tiles = triton.cdiv(rows, constants["ROWS"])
    partial = student.new_empty(tiles, dtype=torch.float32)
    mean, rstd = (student.new_empty(rows, dtype=torch.float32) for _ in range(2))
    with on_device(student):
        _forward[(tiles,)](student, teacher, partial, mean, rstd, rows, beta, eps, **constants)
    return partial.sum() / student.numel(), mean, rstd


def backward(
    dloss: Tensor, student: Tensor, teacher: Tensor, mean: Tensor, rstd: Tensor, beta: float
) -> Tensor:
    """Launches; arguments and results as of `fd_large::whitened_loss_backward`."""
    constants = tile(student.shape[-1])
    rows = student.numel() // student.shape[-1]
    dstudent = torch.empty_like(student)
    with on_device(student):
        _backward[(triton.cdiv(rows, constants["ROWS"]),)](
            dloss,
            student,
            teacher,
            mean,
            rstd,
            dstudent,
            rows,
            # A float, because an int32 may be too small.
            float(student.numel()),
            beta,
            **constants,
        )
    return dstudent

"""The end of the objective: whitening of the teacher's tokens, smooth L1 against the student's.

The Triton kernels, one pass over both maps each way, are in `whitened_loss_triton.py`; `choose.py`
decides whether they or the plain twin run.

Source: Wei et al., arXiv 2205.14141; beta and eps as in the official code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.errors import ShapeError
from fd_large.kernels import choose
from fd_large.kernels.check import checked
from fd_large.kernels.operation import operation
from fd_large.kernels.residual_norm import untested


def whiten(feature_map: Tensor, eps: float = 1e-5) -> Tensor:
    """Gives every token mean 0 and variance 1 over its channels: LayerNorm without affine.

    Args:
        feature_map: (..., C), any float dtype.
        eps: Added to the variance.

    Returns: (..., C), float32 (float64 for a float64 map).
    """
    wide = torch.promote_types(feature_map.dtype, torch.float32)
    return F.layer_norm(feature_map.to(wide), feature_map.shape[-1:], eps=eps)


@checked
def whitened_loss(
    student_map: Tensor, teacher_map: Tensor, *, beta: float = 2.0, eps: float = 1e-5
) -> Tensor:
    """Smooth L1 between the student's map and the whitened teacher's map.

    Args:
        student_map: (B, N, C), projected to the teacher's width, any float dtype.
        teacher_map: (B, N, C), after the teacher's final norm, not whitened; takes no gradient.
        beta: Difference at which the loss turns from quadratic to linear, in whitened units.
        eps: Added to the variance of a teacher's token.

    Returns: scalar, float32 (float64 in a float64 run): the mean over B, N and C.
    Raises: ShapeError: if the maps differ in shape.
    """
    if student_map.shape != teacher_map.shape:
        raise ShapeError(
            "whitened_loss: the maps differ in shape; got "
            f"{tuple(student_map.shape)} from the student and {tuple(teacher_map.shape)} from the "
            "teacher, expected equal. Align grids and prefix tokens, and project to the teacher's "
            "width."
        )
    choice = choose.implementation(
        "whitened_loss",
        student_map.device.type,
        width=student_map.shape[-1],
        empty=not student_map.numel(),
        beta=beta,
        student=student_map.dtype,
        teacher=teacher_map.dtype,
    )
    if choice == "triton":
        return torch.ops.fd_large.whitened_loss(
            student_map.contiguous(), teacher_map.detach().contiguous(), beta, eps
        )[0]
    return whitened_loss_reference(student_map, teacher_map, beta, eps)


def whitened_loss_reference(
    student_map: Tensor, teacher_map: Tensor, beta: float, eps: float
) -> Tensor:
    """The plain twin of `whitened_loss`."""
    target = whiten(teacher_map.detach(), eps)
    wide = torch.promote_types(student_map.dtype, target.dtype)
    return F.smooth_l1_loss(student_map.to(wide), target.to(wide), beta=beta)


def _untested(*, beta: float, **case: Any) -> str:
    return untested(**case) if beta > 0 else f"beta {beta}"


choose.register("whitened_loss", _untested)


def _empty(student, teacher, beta, eps):
    rows = student.numel() // student.shape[-1]
    return tuple(student.new_empty(shape, dtype=torch.float32) for shape in ((), rows, rows))


# The loss, and the teacher's mean and 1/deviation per token.
_whitened_loss = operation(
    "whitened_loss(Tensor student, Tensor teacher, float beta, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    "whitened_loss_triton.forward",
    empty=_empty,
)
# The gradient of the student's map.
operation(
    "whitened_loss_backward(Tensor dloss, Tensor student, Tensor teacher, Tensor mean, Tensor rstd,"
    " float beta) -> Tensor",
    "whitened_loss_triton.backward",
    empty=lambda dloss, student, *rest: torch.empty_like(student),
)


def _setup(ctx, inputs, output):
    student, teacher, beta, _ = inputs
    ctx.save_for_backward(student, teacher, *output[1:])
    ctx.beta = beta
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dloss, _mean, _rstd):
    if dloss is None:
        return (None,) * 4
    dstudent = torch.ops.fd_large.whitened_loss_backward(dloss, *ctx.saved_tensors, ctx.beta)
    return dstudent, None, None, None


_whitened_loss.register_autograd(_gradients, setup_context=_setup)

"""Computes the distillation loss: smooth L1 from the student's map to the whitened teacher's map.

On GPUs torch.compile makes one pass over the two maps in forward and one in backward, as many as
hand-written kernels would make. On CPUs plain torch runs.

Source: Wei et al., arXiv 2205.14141; beta and eps as in the official code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.errors import ShapeError
from fd_large.kernels import choose
from fd_large.kernels.check import checked
from fd_large.kernels.operation import twin


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
    """Computes smooth L1 between the student's map and the whitened teacher's map.

    Args:
        student_map: (B, N, C), projected to the teacher's width, any float dtype.
        teacher_map: (B, N, C), after the teacher's final norm, not yet whitened; takes no gradient.
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
    teacher_map = teacher_map.detach()
    choice = choose.implementation("whitened_loss", student_map.device.type)
    loss = twin("whitened_loss", choice, whitened_loss_reference, student_map, teacher_map)
    return loss(student_map, teacher_map, beta, eps)


def whitened_loss_reference(
    student_map: Tensor, teacher_map: Tensor, beta: float, eps: float
) -> Tensor:
    """Computes `whitened_loss` in plain torch, with the same arguments and result."""
    target = whiten(teacher_map.detach(), eps)
    wide = torch.promote_types(student_map.dtype, target.dtype)
    return F.smooth_l1_loss(student_map.to(wide), target.to(wide), beta=beta)


choose.register("whitened_loss")

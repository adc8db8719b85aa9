from __future__ import annotations

import pytest
import torch

from fd_large.errors import ShapeError
from fd_large.kernels.whitened_loss import whiten, whitened_loss


def test_whiten_gives_mean_0_and_variance_1():
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16) * 7 + 2
    y = whiten(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 3), atol=1e-6, rtol=0)
    torch.testing.assert_close(y.var(-1, unbiased=False), torch.ones(2, 3), atol=1e-4, rtol=0)


def test_whiten_adds_eps_to_the_variance():
    x = torch.tensor([1e-3, -1e-3])
    torch.testing.assert_close(whiten(x, 1e-6), x / (2e-6) ** 0.5)


@pytest.mark.parametrize(("d", "loss"), [(0.0, 0.0), (1.0, 0.25), (2.0, 1.0), (3.0, 2.0)])
def test_loss_is_square_below_beta_and_linear_above(d, loss):
    teacher = torch.tensor([[[1.0, -1.0]]])
    student = whiten(teacher) + d
    torch.testing.assert_close(whitened_loss(student, teacher).item(), loss)


def test_loss_of_a_silent_student_is_a_quarter():
    teacher = torch.randn(8, 50, 256)
    loss = whitened_loss(torch.zeros_like(teacher), teacher)
    assert abs(loss.item() - 0.2475) < 2e-3


def test_loss_is_float32_and_takes_no_gradient_to_the_teacher():
    student = torch.randn(1, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    teacher = torch.randn(1, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    loss = whitened_loss(student, teacher)
    loss.backward()
    assert loss.dtype == torch.float32
    assert student.grad is not None
    assert teacher.grad is None


def test_maps_of_another_shape_are_named():
    with pytest.raises(ShapeError, match=r"\(1, 2, 8\).*\(1, 3, 8\)"):
        whitened_loss(torch.zeros(1, 2, 8), torch.zeros(1, 3, 8))

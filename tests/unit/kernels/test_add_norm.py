from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fd_large.errors import ShapeError
from fd_large.kernels.add_norm import add_branch, add_norm


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 2, 8, generator=generator).to(dtype)
    branch = torch.randn(3, 5, 2, 8, generator=generator).to(dtype)
    weight = torch.randn(8, generator=generator)
    bias = torch.randn(8, generator=generator)
    return x, branch, weight, bias


def test_add_norm_is_the_scaled_sum_and_its_norm():
    x, branch, weight, bias = tensors()
    scale, gamma = torch.tensor([0.0, 1.0, 1.25]), torch.linspace(0.1, 0.8, 8)
    y, normed = add_norm(x, branch, weight, bias, 1e-6, scale, gamma)
    for b in range(3):
        torch.testing.assert_close(y[b], x[b] + scale[b] * gamma * branch[b])
    torch.testing.assert_close(normed, F.layer_norm(y, (8,), weight, bias, 1e-6))
    assert torch.equal(add_branch(x, branch, scale, gamma), y)


def test_add_norm_rounds_the_stream_once_and_norms_what_it_stored():
    x, branch, weight, bias = tensors(torch.bfloat16)
    y, normed = add_norm(x, branch, weight, bias, 1e-6, dtype=torch.float32)
    assert torch.equal(y, (x.float() + branch.float()).bfloat16())
    torch.testing.assert_close(normed, F.layer_norm(y.float(), (8,), weight, bias, 1e-6))


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, f, w, b: add_norm(x, f[..., :4], w, b, 1e-5), "branch"),
        (lambda x, f, w, b: add_norm(x, f, w, b, 1e-5, None, w[:4]), "gamma"),
        (lambda x, f, w, b: add_branch(x, f[:, :1]), "branch"),
    ],
)
def test_what_does_not_go_together_is_refused(call, name):
    with pytest.raises(ShapeError, match=f": {name} "):
        call(*tensors())

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fd_large.errors import ShapeError
from fd_large.kernels.residual_norm import layer_norm, residual_norm


def tensors(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 2, 8, generator=generator).to(dtype)
    branch = torch.randn(3, 5, 2, 8, generator=generator).to(dtype)
    weight = torch.randn(8, generator=generator)
    bias = torch.randn(8, generator=generator)
    return x, branch, weight, bias


def test_residual_norm_adds_scaled_norm_per_sample():
    x, branch, weight, bias = tensors()
    scale = torch.tensor([0.0, 1.0, 1.25])
    y, same = residual_norm(x, branch, weight, bias, 1e-5, scale)
    assert same is y
    for b in range(3):
        normed = F.layer_norm(branch[b], (8,), weight, bias, 1e-5)
        torch.testing.assert_close(y[b], x[b] + scale[b] * normed)
    assert torch.equal(y[0], x[0])


def test_residual_norm_rounds_once():
    x, branch, weight, bias = tensors(torch.bfloat16)
    y, _ = residual_norm(x, branch, weight.bfloat16(), bias.bfloat16(), 1e-5)
    exact = x.double() + F.layer_norm(
        branch.double(), (8,), weight.bfloat16().double(), bias.bfloat16().double(), 1e-5
    )
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_residual_norm_keeps_the_dtype_of_the_stream_and_copies_it():
    x, branch, weight, bias = tensors()
    arguments = (x, branch.bfloat16(), weight.bfloat16(), bias.bfloat16(), 1e-5)
    y, narrow = residual_norm(*arguments, copy=torch.bfloat16)
    assert y.dtype == torch.float32
    assert torch.equal(narrow, y.bfloat16())


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_takes_mixed_dtypes(x_dtype, weight_dtype):
    x, _, weight, bias = tensors(x_dtype)
    weight, bias = weight.to(weight_dtype), bias.to(weight_dtype)
    y = layer_norm(x, weight, bias, 1e-5, dtype=torch.float32)
    expected = F.layer_norm(x.float(), (8,), weight.float(), bias.float(), 1e-5)
    torch.testing.assert_close(y, expected)
    assert layer_norm(x, weight, bias, 1e-5).dtype == x_dtype


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda x, f, w, b: residual_norm(x, f[:1], w, b, 1e-5), "branch"),
        (lambda x, f, w, b: residual_norm(x, f, w[:4], b, 1e-5), "weight"),
        (lambda x, f, w, b: residual_norm(x, f, w, b, 1e-5, branch_bias=b[:1]), "branch_bias"),
        (lambda x, f, w, b: residual_norm(x, f, w, b, 1e-5, torch.ones(2)), "scale"),
    ],
)
def test_what_does_not_go_together_is_refused(call, name):
    with pytest.raises(ShapeError, match=f": {name} "):
        call(*tensors())

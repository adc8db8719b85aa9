"""GELU's kernels against float64, where Triton runs; started by test_triton.py."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fd_large.kernels.linear_gelu import ACTIVATIONS, linear_gelu, linear_gelu_reference

DTYPES = (torch.float32, torch.bfloat16)


def tensors(rows, width, dtype, device, seed):
    generator = torch.Generator().manual_seed(seed)
    product = torch.randn(rows, width, generator=generator) * 3
    bias = torch.randn(width, generator=generator)
    dout = torch.randn(rows, width, generator=generator)
    return [t.to(dtype).to(device) for t in (product, bias, dout)]


@settings(
    deadline=None,
    max_examples=20 if torch.cuda.is_available() else 8,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    width=st.one_of(st.integers(32, 1500), st.sampled_from([32, 512, 1024])),
    rows=st.integers(1, 30),
    dtype=st.sampled_from(DTYPES),
    bias_dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(list(ACTIVATIONS)),
    seed=st.integers(0, 1000),
)
def test_value_and_gradients(width, rows, dtype, bias_dtype, activation, seed, device):
    product, bias, dout = tensors(rows, width, dtype, device, seed)
    bias = bias.to(bias_dtype)
    found = {}
    for name, wide in (("kernel", None), ("eager", None), ("exact", torch.float64)):
        leaves = [t.detach().to(wide or t.dtype).requires_grad_() for t in (product, bias)]
        if name == "kernel":
            out = torch.ops.fd_large.bias_gelu(*leaves, activation == "quick_gelu")
        else:
            out = ACTIVATIONS[activation]((leaves[0] + leaves[1]).to(leaves[0].dtype))
        out.backward(dout.to(out.dtype))
        found[name] = out.detach(), *(leaf.grad for leaf in leaves)
    for name, got, exact, eager in zip(
        ("value", "product", "bias"), found["kernel"], found["exact"], found["eager"], strict=True
    ):
        assert_close(name, got, exact, eager)


def test_more_tiles_than_programs(device, monkeypatch):
    from fd_large.kernels import linear_gelu_triton as kernels

    monkeypatch.setattr(kernels, "_PROGRAMS", 3)
    rows = kernels._ROWS * 5 - 1
    product, bias, dout = tensors(rows, 32, torch.float32, device, 1)
    got = torch.ops.fd_large.bias_gelu_backward(dout, product, bias, False)
    leaves = [t.detach().double().requires_grad_() for t in (product, bias)]
    torch.nn.functional.gelu(leaves[0] + leaves[1]).backward(dout.double())
    for name, a, leaf in zip(("product", "bias"), got, leaves, strict=True):
        assert_close(name, a, leaf.grad, leaf.grad.float())
    for _ in range(20 if device == "cuda" else 1):
        again = torch.ops.fd_large.bias_gelu_backward(dout, product, bias, False)
        assert all(map(torch.equal, got, again))


@pytest.mark.parametrize(("width", "made"), [(48, "triton"), (16, "reference")])
def test_the_layer_and_where_the_kernels_run(width, made, device, chosen):
    generator = torch.Generator().manual_seed(2)
    x, weight, bias = (
        torch.randn(shape, generator=generator).to(device).requires_grad_()
        for shape in ((2, 3, 8), (width, 8), (width,))
    )
    # A bias in strided memory is as good.
    out = linear_gelu(x, weight, torch.stack([bias, bias], dim=-1)[:, 0])
    assert chosen == [("linear_gelu", made)]
    expected = linear_gelu_reference(x, weight, bias)
    torch.testing.assert_close(out, expected)
    for a, b in zip(
        *(torch.autograd.grad(y.sin().sum(), (x, weight, bias)) for y in (out, expected)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_registration(device):
    product, bias, _ = tensors(5, 48, torch.float32, device, 3)
    leaves = [t.requires_grad_() for t in (product, bias)]
    torch.library.opcheck(torch.ops.fd_large.bias_gelu.default, (*leaves, False))

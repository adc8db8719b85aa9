from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F

from fd_large.errors import ConfigError
from fd_large.kernels import choose
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
    y = residual_norm(x, branch, weight, bias, 1e-5, scale)
    for b in range(3):
        normed = F.layer_norm(branch[b], (8,), weight, bias, 1e-5)
        torch.testing.assert_close(y[b], x[b] + scale[b] * normed)
    assert torch.equal(y[0], x[0])


def test_residual_norm_rounds_once():
    x, branch, weight, bias = tensors(torch.bfloat16)
    y = residual_norm(x, branch, weight.bfloat16(), bias.bfloat16(), 1e-5)
    exact = x.double() + F.layer_norm(
        branch.double(), (8,), weight.bfloat16().double(), bias.bfloat16().double(), 1e-5
    )
    assert y.dtype == torch.bfloat16
    assert ((y.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all()


def test_residual_norm_keeps_the_dtype_of_the_stream():
    x, branch, weight, bias = tensors()
    y = residual_norm(x, branch.bfloat16(), weight.bfloat16(), bias.bfloat16(), 1e-5)
    assert y.dtype == torch.float32


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_layer_norm_takes_mixed_dtypes(x_dtype, weight_dtype):
    x, _, weight, bias = tensors(x_dtype)
    weight, bias = weight.to(weight_dtype), bias.to(weight_dtype)
    y = layer_norm(x, weight, bias, 1e-5, dtype=torch.float32)
    expected = F.layer_norm(x.float(), (8,), weight.float(), bias.float(), 1e-5)
    torch.testing.assert_close(y, expected)
    assert layer_norm(x, weight, bias, 1e-5).dtype == x_dtype


@pytest.fixture
def apex_stand_in(monkeypatch):
    """A STAND-IN for NVIDIA apex: it has its names and signature, none of its kernels."""
    calls = []

    def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6):
        calls.append(tuple(normalized_shape))
        return F.layer_norm(input, normalized_shape, weight, bias, eps)

    names = ("apex", "apex.normalization", "apex.normalization.fused_layer_norm", "apex.optimizers")
    modules = {name: types.ModuleType(name) for name in names}
    modules["apex"].__spec__ = types.SimpleNamespace(name="apex")
    modules["apex.normalization"].FusedLayerNorm = object
    modules["apex.optimizers"].FusedAdam = object
    modules["apex.normalization.fused_layer_norm"].fused_layer_norm_affine = fused_layer_norm_affine
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(choose, "APEX_DEVICES", ("cpu", "cuda"))
    choose.apex_layer_norm.cache_clear()
    yield calls
    choose.apex_layer_norm.cache_clear()


def test_apex_runs_when_asked_for(apex_stand_in, monkeypatch):
    x, _, weight, bias = tensors()
    expected = layer_norm(x, weight, bias, 1e-5)
    assert apex_stand_in == []
    monkeypatch.setenv("FD_KERNELS", "apex")
    assert torch.equal(layer_norm(x, weight, bias, 1e-5), expected)
    assert apex_stand_in == [(8,)]


def test_another_project_named_apex_is_refused(apex_stand_in, monkeypatch):
    monkeypatch.delattr(sys.modules["apex.optimizers"], "FusedAdam")
    monkeypatch.setenv("FD_KERNELS", "apex")
    x, _, weight, bias = tensors()
    with pytest.raises(ConfigError, match="another project"):
        layer_norm(x, weight, bias, 1e-5)


def test_apex_where_it_has_no_kernel_is_refused(monkeypatch):
    monkeypatch.setenv("FD_KERNELS", "apex")
    assert choose.implementation("cuda") == "apex"
    with pytest.raises(ConfigError, match="got cpu, expected cuda"):
        choose.implementation("cpu")


def test_unknown_implementation_is_named(monkeypatch):
    monkeypatch.setenv("FD_KERNELS", "apx")
    with pytest.raises(ConfigError, match="nearest: apex"):
        choose.wished()

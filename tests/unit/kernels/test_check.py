"""An operation whose kernel is off its reference is found, and given up on all ranks.

The operation is a stand-in whose kernel can be made wrong; real kernels in Triton's interpreter are
in tests/integration/test_kernels_step.py.
"""

from __future__ import annotations

import pytest
import torch

from fd_large.kernels import check, choose
from fd_large.ranks import distributed

CPU = torch.device("cpu")


class Kernel(torch.autograd.Function):
    """x weight, rounded once; `value` and `gradient` make it wrong."""

    value = gradient = staticmethod(lambda x: x)

    @staticmethod
    def forward(ctx, x, weight, dtype):
        ctx.save_for_backward(x, weight)
        return Kernel.value((x.float() * weight.float()).to(dtype))

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dweight = (dy.float() * x.float()).flatten(0, -2).sum(0)
        dx = (dy.float() * weight.float()).to(x.dtype)
        return Kernel.gradient(dx), dweight.to(weight.dtype), None


@check.checked
def scaled(x, weight, *, dtype):
    if choose.implementation("scaled", x.device.type) == "triton":
        return Kernel.apply(x, weight, dtype)
    return (x * weight).to(dtype)


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """The stand-in is an operation whose kernel is chosen."""
    for name, value in {"FD_KERNELS": "triton", "TRITON_INTERPRET": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(choose, "_operations", dict(choose._operations))
    monkeypatch.setattr(choose, "find_spec", lambda name: True)
    choose.reset()
    choose.register("scaled", lambda: "")
    yield
    choose.reset()


def calls_of(dtype):
    with check.recording() as calls, torch.device("meta"):
        x = torch.ones(2, 5, 64, dtype=dtype, requires_grad=True)
        weight = torch.ones(64, requires_grad=True)
        for _ in range(2):
            scaled(x, weight, dtype=dtype)
        with torch.no_grad():
            scaled(x, weight, dtype=torch.float32)
    return list(calls)


def nan(x):
    return x.index_fill(0, torch.tensor([1]), torch.nan)


def one_element(x):
    y = x.clone()
    y.view(-1)[77] += 0.5
    return y


def raising(x):
    raise RuntimeError("an illegal memory access")


def test_calls_are_written_down_once_without_values():
    first, second = calls_of(torch.bfloat16)
    assert first.arguments[0] == check.Shape((2, 5, 64), torch.bfloat16, True)
    assert not second.arguments[0].learns
    assert first.kernels == ("scaled",)
    assert not calls_of_reference()


def calls_of_reference():
    with choose.references():
        return calls_of(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_kernel_passes(dtype):
    assert check.beside_references(calls_of(dtype), CPU) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["value", "gradient"])
@pytest.mark.parametrize("wrong", [lambda x: 1.03 * x, nan, one_element, raising])
def test_a_wrong_value_or_gradient_is_found(dtype, place, wrong, monkeypatch):
    calls = calls_of(dtype)
    monkeypatch.setattr(Kernel, place, staticmethod(wrong))
    off = check.beside_references(calls, CPU)
    assert "scaled of (2, 5, 64)" in off["scaled"]


def test_what_is_off_on_one_rank_is_given_up_on_all(monkeypatch, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setattr(distributed, "gather_objects", lambda mine: [mine, {"scaled": "off by 1"}])
    x = torch.randn(3, 64)
    monkeypatch.setattr(Kernel, "value", staticmethod(nan))
    assert scaled(x, torch.ones(64), dtype=x.dtype).isnan().any()
    monkeypatch.setattr(check, "beside_references", lambda calls, device: {})
    check.check(calls_of(torch.float32), CPU)
    assert torch.equal(scaled(x, torch.ones(64), dtype=x.dtype), x)
    assert "off by 1" in caplog.text
    assert "on rank 1" in caplog.text
    assert calls_of(torch.float32) == []

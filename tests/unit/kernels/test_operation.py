"""The plain twins through torch.compile, on a CPU in eager kernels."""

from __future__ import annotations

import logging

import pytest
import torch
from torch._dynamo.utils import counters

from fd_large.kernels import choose, operation
from fd_large.kernels.add_norm import add_branch, add_norm
from fd_large.kernels.quick_gelu import quick_gelu
from fd_large.kernels.residual_norm import layer_norm, residual_norm
from fd_large.kernels.residual_norm import stream_norm as both_norms
from fd_large.kernels.whitened_loss import whitened_loss
from fd_large.kernels.window_attention import window_attention

BF16 = torch.bfloat16
VECTORS = [torch.linspace(0.5, 1.5, 12), torch.linspace(-1, 1, 12)]


def attention(x):
    return window_attention(
        torch.cat([x.view(-1, 2, 2, 12)] * 3, dim=-1), num_heads=2, window=2, shift=0,
        scale=torch.ones(2), cosine=True, table=torch.linspace(0, 1, 18).view(9, 2),
        memory="recompute",
    )  # fmt: skip


CALLS = {
    "quick_gelu": quick_gelu,
    "layer_norm": lambda x: layer_norm(x, *VECTORS, 1e-5, dtype=BF16),
    "stream_norm": lambda x: both_norms(x, *VECTORS, 1e-5, copy=BF16),
    "residual_norm": lambda x: residual_norm(x, x.sin(), *VECTORS, 1e-5, x[:, 0, 0], copy=BF16),
    "add_norm": lambda x: add_norm(x, x.sin(), *VECTORS, 1e-5, x[:, 0, 0], VECTORS[0]),
    "add_branch": lambda x: add_branch(x, x.sin(), None, VECTORS[0]),
    "whitened_loss": lambda x: whitened_loss(x, x.cos(), beta=0.5),
    "window_attention": attention,
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    choose.reset()
    operation._compiled.cache_clear()
    counters.clear()
    yield
    choose.reset()
    operation._compiled.cache_clear()


def results(call, batch):
    x = torch.randn(batch, 4, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    outs = call(x)
    outs = outs if isinstance(outs, tuple) else (outs,)
    return *outs, *torch.autograd.grad(sum(out.float().sin().sum() for out in outs), x)


@pytest.mark.parametrize("op", CALLS)
def test_values_and_gradients_are_the_references_and_batches_share_a_graph(op, monkeypatch):
    expected = {batch: results(CALLS[op], batch) for batch in (2, 3, 5)}
    assert not counters["stats"]
    monkeypatch.setenv("FD_KERNELS", "compiled")
    for batch, plain in expected.items():
        for a, b in zip(results(CALLS[op], batch), plain, strict=True):
            torch.testing.assert_close(a, b)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_within_a_compiled_region_the_twin_is_a_part_of_it(monkeypatch):
    monkeypatch.setenv("FD_KERNELS", "compiled")

    def block(x):
        return quick_gelu(layer_norm(x, *VECTORS, 1e-5))

    x = torch.randn(2, 4, 12)
    whole = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(whole, block(x))


def test_where_compiling_fails_the_plain_twin_runs_and_the_log_says_so(monkeypatch, caplog):
    x = torch.randn(2, 4, 12)
    expected = quick_gelu(x)
    monkeypatch.setenv("FD_KERNELS", "compiled")
    monkeypatch.setattr(operation, "backend", lambda device_type: failing)
    with caplog.at_level(logging.WARNING, logger="fd_large"):
        assert torch.equal(quick_gelu(x), expected)
    assert "quick_gelu: torch.compile failed" in caplog.text
    assert "quick_gelu" in choose.refused()
    assert torch.equal(quick_gelu(x), expected)


def failing(graph, inputs):
    raise RuntimeError("no compiler here")

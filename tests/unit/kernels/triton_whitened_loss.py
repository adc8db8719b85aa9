"""The loss's kernels against float64, where Triton runs; started by test_triton.py."""

from __future__ import annotations

import pytest
import torch
from closeness import assert_close
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fd_large.kernels.whitened_loss import whitened_loss, whitened_loss_reference

DTYPES = (torch.float32, torch.bfloat16)


def maps(shape, student, teacher, device, seed):
    generator = torch.Generator().manual_seed(seed)
    s = (torch.randn(shape, generator=generator) * 2).to(student).to(device).requires_grad_()
    t = (torch.randn(shape, generator=generator) * 5 + 3).to(teacher).to(device)
    return s, t


@settings(
    deadline=None,
    max_examples=40 if torch.cuda.is_available() else 12,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    width=st.one_of(
        st.integers(32, 2048),
        st.integers(4, 1024).map(lambda n: 8 * n),
        st.sampled_from([32, 768, 8192]),
    ),
    batch=st.integers(1, 3),
    student=st.sampled_from(DTYPES),
    teacher=st.sampled_from(DTYPES),
    beta=st.sampled_from([0.25, 1.0, 2.0]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradient(width, batch, student, teacher, beta, seed, device):
    s, t = maps((batch, max(1, 8000 // width), width), student, teacher, device, seed)
    eps = 1e-5
    found = {}
    for name, function, dtype in (
        ("kernel", lambda s, t: whitened_loss(s, t, beta=beta, eps=eps), None),
        ("eager", lambda s, t: whitened_loss_reference(s, t, beta, eps), None),
        ("exact", lambda s, t: whitened_loss_reference(s, t, beta, eps), torch.float64),
    ):
        leaf = s.detach().to(dtype or s.dtype).requires_grad_()
        loss = function(leaf, t.to(dtype or t.dtype))
        # A gradient of the size of the elements' number, so that its bound means something.
        (loss * s.numel()).backward()
        found[name] = loss.detach(), leaf.grad
    for name, got, exact, eager in zip(
        ("loss", "gradient"), found["kernel"], found["exact"], found["eager"], strict=True
    ):
        assert_close(name, got, exact, eager)


def test_same_bits_every_time(device):
    rows = 30_000 if device == "cuda" else 700
    s, t = maps((2, rows, 96), torch.bfloat16, torch.bfloat16, device, 1)

    def once():
        loss = whitened_loss(s, t)
        return loss, *torch.autograd.grad(loss, s)

    first = once()
    for _ in range(20 if device == "cuda" else 2):
        assert all(map(torch.equal, first, once()))


def test_a_target_that_is_a_view_and_a_scaled_loss(device):
    s, t = maps((2, 6, 40), torch.float32, torch.float32, device, 2)
    whole = torch.cat([t[:, :1], t], dim=1)
    (3 * whitened_loss(s, whole[:, 1:])).backward()
    (expected,) = torch.autograd.grad(3 * whitened_loss_reference(s, t, 2.0, 1e-5), s)
    torch.testing.assert_close(s.grad, expected)


@pytest.mark.parametrize(
    ("width", "beta", "made"),
    [(40, 2.0, "triton"), (40, 0.0, "reference"), (9000, 2.0, "reference")],
)
def test_where_the_kernels_run(width, beta, made, device, chosen):
    s, t = maps((1, 2, width), torch.float32, torch.float32, device, 3)
    loss = whitened_loss(s, t, beta=beta)
    assert chosen == [("whitened_loss", made)]
    torch.testing.assert_close(loss, whitened_loss_reference(s, t, beta, 1e-5))


def test_registration(device):
    s, t = maps((2, 5, 48), torch.bfloat16, torch.float32, device, 4)
    torch.library.opcheck(torch.ops.fd_large.whitened_loss.default, (s, t, 2.0, 1e-5))

"""Statistics of whole steps: the same in any parts, and moved slowly in float32."""

from __future__ import annotations

import pytest
import torch

from fd_large.tasks.distillation.normalisers import RUNNING, check_normaliser, make_normaliser
from fd_large.tasks.distillation.running_statistics import moments_of, momentum_at, sums_of


def tokens() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return 100 + torch.randn(6, 5, 4, generator=draw) * torch.tensor([1e-3, 1.0, 10.0, 0.0])


def test_parts_give_the_moments_of_the_whole():
    whole = moments_of(sums_of(tokens()))
    parts = moments_of(torch.stack([sums_of(part) for part in tokens().split(4)]).sum(0))
    rows = tokens().double().flatten(0, 1)
    for found in (whole, parts):
        torch.testing.assert_close(found.mean, rows.mean(0), rtol=1e-13, atol=0)
        torch.testing.assert_close(found.variance, rows.var(0), rtol=1e-3, atol=1e-10)
    torch.testing.assert_close(parts.variance, whole.variance, rtol=1e-3, atol=1e-10)


def test_the_first_step_takes_its_statistics_and_the_last_hardly_any():
    assert momentum_at(0) == 1
    assert momentum_at(0.5) == pytest.approx(0.5005)
    assert momentum_at(1) == pytest.approx(1e-3)
    module, step = RUNNING["running"](4), moments_of(sums_of(tokens()))
    torch.testing.assert_close(module(tokens()), tokens() / (1 + 1e-6))
    module.move(step, momentum_at(0))
    torch.testing.assert_close(module.mean, step.mean.float())
    torch.testing.assert_close(module.deviation, step.variance.sqrt().float() + 1e-6)


@pytest.mark.parametrize("name", RUNNING)
def test_statistics_stay_in_float32_and_a_constant_channel_stays_finite(name):
    module = make_normaliser(name, eps=1e-5, width=4)
    check_normaliser(module, name)
    module.move(moments_of(sums_of(tokens())), 1.0)
    kept = module.mean.clone()
    module.bfloat16()
    assert torch.equal(module.mean, kept)
    given = module(tokens().bfloat16())
    assert given.dtype == torch.float32
    assert given.isfinite().all()

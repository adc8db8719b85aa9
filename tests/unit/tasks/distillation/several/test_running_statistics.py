"""Statistics of whole steps: the same in any parts, and moved slowly in float32."""

from __future__ import annotations

import pytest
import torch

from fd_large.tasks.distillation.job import RUNNING
from fd_large.tasks.distillation.normalisers import check_normaliser, make_normaliser
from fd_large.tasks.distillation.several.running_statistics import (
    moments_of,
    momentum_at,
    sums_of,
)


def tokens() -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return 100 + torch.randn(6, 5, 4, generator=draw) * torch.tensor([1e-3, 1.0, 10.0, 0.0])


def test_parts_give_the_moments_of_the_whole():
    whole = moments_of(sums_of(tokens(), 1))
    parts = moments_of(torch.stack([sums_of(part, 1) for part in tokens().split(4)]).sum(0))
    for row, rows in enumerate((tokens()[:, 0], tokens()[:, 1:].flatten(0, 1))):
        rows = rows.double()
        for found in (whole, parts):
            torch.testing.assert_close(found.mean[row], rows.mean(0), rtol=1e-13, atol=0)
            torch.testing.assert_close(found.variance[row], rows.var(0), rtol=1e-3, atol=1e-10)


def test_the_first_step_takes_its_statistics_and_the_last_hardly_any():
    assert momentum_at(0) == 1
    assert momentum_at(0.5) == pytest.approx(0.5005)
    assert momentum_at(1) == pytest.approx(1e-3)
    module, step = RUNNING["running"](4), moments_of(sums_of(tokens()))
    torch.testing.assert_close(module(tokens()), tokens() / (1 + 1e-6))
    module.move(step, momentum_at(0))
    torch.testing.assert_close(module.mean[1], step.mean[1].float())
    torch.testing.assert_close(module.deviation[1], step.variance[1].sqrt().float() + 1e-6)
    # Those of prefix tokens, of which there are none, stay.
    assert module.mean[0].eq(0).all()
    assert module.deviation[0].eq(1).all()


@pytest.mark.parametrize("name", RUNNING)
def test_statistics_stay_in_float32_and_a_constant_channel_stays_finite(name):
    module = make_normaliser(name, eps=1e-5, width=4, running=RUNNING)
    check_normaliser(module, name)
    module.move(moments_of(sums_of(tokens())), 1.0)
    kept = module.mean.clone()
    module.bfloat16()
    assert torch.equal(module.mean, kept)
    given = module(tokens().bfloat16())
    assert given.dtype == torch.float32
    assert given.isfinite().all()

from __future__ import annotations

import pretended_ranks
import pytest
import torch
from torch import nn

from fd_large.tasks.dense.batch_norm import BatchNorm


def norms(width: int = 5) -> tuple[BatchNorm, nn.BatchNorm2d]:
    """Ours and torch's, with the same parameters, in float64."""
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(width)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = BatchNorm(width)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "num_" not in k})
    return ours.double(), theirs.double()


def run(norm: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the gradients of input, weight and bias of a sum that weighs all places."""
    x = x.clone().requires_grad_()
    y = norm(x)
    (y * torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).view_as(y[0])).square().sum().backward()
    found = [y.detach(), x.grad, norm.weight.grad, norm.bias.grad]
    norm.zero_grad()
    return found


def test_it_is_torch_s_norm_and_moves_once_a_step():
    ours, theirs = norms()
    x = torch.randn(3, 5, 4, 7, dtype=torch.float64) * 2 + 1
    torch.testing.assert_close(run(ours, x), run(theirs, x))
    assert ours.running_mean.eq(0).all()
    ours.move()
    ours.move()
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_a_refused_step_moves_nothing_and_two_passes_move_once():
    ours, _ = norms()
    ours(torch.full((1, 5, 2, 2), torch.nan, dtype=torch.float64))
    ours.forget()
    ours.move()
    assert ours.running_mean.eq(0).all()
    for value in (1.0, 3.0):
        ours(torch.full((1, 5, 2, 2), value, dtype=torch.float64))
    ours.move()
    torch.testing.assert_close(ours.running_mean, torch.full((5,), 0.2, dtype=torch.float64))


def test_two_ranks_are_one(monkeypatch):
    whole, _ = norms()
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    expected = run(whole, x)
    whole.move()
    world, parts = pretended_ranks.World(monkeypatch, 2), [norms()[0], norms()[0]]

    def one() -> tuple[list[torch.Tensor], torch.Tensor]:
        norm, rank = parts[pretended_ranks.rank()], pretended_ranks.rank()
        found = run(norm, x[2 * rank : 2 * rank + 2])
        norm.move()
        return found, norm.running_var

    (first, variance), (second, same) = world.run(one)
    for place in (0, 1):
        torch.testing.assert_close(torch.cat([first[place], second[place]]), expected[place])
    for place in (2, 3):  # The engine averages the ranks' gradients of parameters.
        torch.testing.assert_close(first[place] + second[place], expected[place])
    torch.testing.assert_close(variance, whole.running_var)
    assert torch.equal(variance, same)


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_keeps_the_statistics_in_float32(training):
    norm = BatchNorm(3)
    norm.running_mean.fill_(1 / 3)
    norm = norm.bfloat16().train(training)
    assert norm.weight.dtype == torch.bfloat16
    assert norm.running_mean.eq(torch.tensor(1 / 3)).all()
    x = torch.randn(2, 3, 4, 4).bfloat16()
    assert norm(x).dtype == torch.bfloat16

"""Batch norms by groups of images, against torch's own, whatever the ranks and passes."""

from __future__ import annotations

import pretended_ranks
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fd_large.backbones.batch_norm import (
    PASS,
    BatchNorm,
    Groups,
    adopt,
    forget,
    move,
    statistics_of,
)
from fd_large.engine.student import group_norms
from fd_large.engine.task import Task

RUNNING = ("running_mean", "running_var")


def norms(width: int = 5) -> tuple[BatchNorm, nn.BatchNorm2d]:
    """Ours and torch's, with the same parameters, in float64."""
    torch.manual_seed(0)
    theirs = nn.BatchNorm2d(width)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    ours = BatchNorm(width)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if "num_" not in k})
    return ours.double(), theirs.double()


def adopted(size: int) -> tuple[nn.BatchNorm2d, Groups]:
    """Torch's norm of `norms` with our forward, and its groups."""
    _, norm = norms()
    groups = adopt(norm)
    groups.size = size
    return norm, groups


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
    move([ours])
    move([ours])
    for name in RUNNING:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize("size", [2, 3, 6])
def test_each_group_is_normalised_as_torch_does(size):
    ours, _ = adopted(size)
    x = torch.randn(6, 5, 4, 7, dtype=torch.float64) * 2 + 1
    found, moments = run(ours, x), []
    weights = torch.linspace(-1, 1, x[0].numel(), dtype=x.dtype).view_as(x[0])
    _, theirs = norms()
    theirs.momentum = 1.0
    leaf, outputs = x.clone().requires_grad_(), []
    for part in leaf.split(size):
        outputs.append(theirs(part))
        moments.append(torch.stack([getattr(theirs, name) for name in RUNNING]).clone())
    y = torch.cat(outputs)
    (y * weights).square().sum().backward()
    wanted = [y.detach(), leaf.grad, theirs.weight.grad, theirs.bias.grad]
    torch.testing.assert_close(found, wanted)
    move([ours])
    mean, variance = torch.stack(moments).mean(0)
    torch.testing.assert_close(ours.running_mean, 0.1 * mean)
    torch.testing.assert_close(ours.running_var, 0.9 + 0.1 * variance)


@pytest.mark.parametrize(("size", "ranks"), [(6, 2), (4, 2), (6, 3), (12, 3), (4, 6)])
def test_groups_are_the_same_on_any_number_of_ranks(monkeypatch, size, ranks):
    x = torch.randn(12, 5, 3, 3, dtype=torch.float64)
    whole, _ = adopted(size)
    expected = run(whole, x)
    move([whole])
    world = pretended_ranks.World(monkeypatch, ranks)
    parts = [adopted(size) for _ in range(ranks)]

    def one() -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        rank = pretended_ranks.rank()
        norm, groups = parts[rank]
        groups.lie_in(12, 12 // ranks)
        found = run(norm, x.chunk(ranks)[rank])
        move([norm])
        return found, statistics_of(nn.ModuleDict({"norm": norm}))

    outputs, statistics = zip(*world.run(one), strict=True)
    for place in (0, 1):
        torch.testing.assert_close(torch.cat([found[place] for found in outputs]), expected[place])
    for place in (2, 3):  # The engine averages the ranks' gradients of parameters.
        torch.testing.assert_close(sum(found[place] for found in outputs), expected[place])
    for found in statistics:
        for name in RUNNING:
            torch.testing.assert_close(found[f"norm.{name}"], getattr(whole, name))
            assert torch.equal(found[f"norm.{name}"], statistics[0][f"norm.{name}"])


def test_a_pass_of_a_step_of_several_holds_whole_groups(monkeypatch):
    whole, _ = adopted(2)
    x = torch.randn(8, 5, 3, 3, dtype=torch.float64)
    expected = run(whole, x)[1]
    move([whole])
    passes, groups = adopted(2)
    groups.lie_in(8, 4)
    torch.testing.assert_close(torch.cat([run(passes, part)[1] for part in x.split(4)]), expected)
    move([passes])
    torch.testing.assert_close(passes.running_var, whole.running_var)


def test_a_recomputed_pass_counts_once_and_a_trial_not_at_all():
    plain, _ = adopted(2)
    again, _ = adopted(2)
    x = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    run(plain, x)
    with torch.no_grad():
        again(x + 1)
    leaf = x.clone().requires_grad_()
    y = checkpoint(again, leaf, use_reentrant=False)
    (y * torch.linspace(-1, 1, y[0].numel(), dtype=y.dtype).view_as(y[0])).square().sum().backward()
    for norm in (plain, again):
        move([norm])
    for name in RUNNING:
        assert torch.equal(getattr(plain, name), getattr(again, name))


def test_a_refused_step_moves_nothing_and_two_passes_move_once():
    ours, _ = norms()
    run(ours, torch.full((1, 5, 2, 2), torch.nan, dtype=torch.float64))
    forget([ours])
    move([ours])
    assert ours.running_mean.eq(0).all()
    for value in (1.0, 3.0):
        run(ours, torch.full((1, 5, 2, 2), value, dtype=torch.float64))
    move([ours])
    torch.testing.assert_close(ours.running_mean, torch.full((5,), 0.2, dtype=torch.float64))


def test_images_that_a_model_flattens_with_places_stay_together():
    flat, groups = adopted(2)
    groups.images = 4
    rows = torch.randn(4 * 9, 5, dtype=torch.float64)
    maps, _ = adopted(2)
    as_maps = rows.view(4, 9, 5).transpose(1, 2).unflatten(2, (3, 3))
    torch.testing.assert_close(flat(rows).view(4, 9, 5).mT.unflatten(2, (3, 3)), maps(as_maps))


def test_a_pass_of_another_size_before_backward_changes_nothing():
    alone, _ = adopted(2)
    both, groups = adopted(2)
    images = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    gradients = []
    for norm, more in ((alone, False), (both, True)):
        groups.images, leaf = 4, images.clone().requires_grad_()
        y = norm(leaf)
        if more:
            groups.images = 2
            norm(images[:2])
        y.square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_norms_of_a_users_own_keep_their_groups():
    student = nn.Sequential(BatchNorm(3))
    student.drop_path_rates = ()
    task = Task(student)
    group_norms(task, 2, global_batch=4, micro_batch=2)
    assert task.student[0].norm_groups.size == PASS


def test_without_groups_the_running_statistics_are_used_in_training():
    norm, _ = adopted(0)
    norm.running_mean.fill_(1 / 3)
    x = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(norm.train()(x), norm.eval()(x))
    move([norm])
    assert norm.running_mean.eq(1 / 3).all()


@pytest.mark.parametrize("training", [True, False])
def test_bfloat16_keeps_the_statistics_in_float32(training):
    norm = BatchNorm(3)
    norm.running_mean.fill_(1 / 3)
    norm = norm.bfloat16().train(training)
    assert norm.weight.dtype == torch.bfloat16
    assert norm.running_mean.eq(torch.tensor(1 / 3)).all()
    x = torch.randn(2, 3, 4, 4).bfloat16()
    assert norm(x).dtype == torch.bfloat16

"""The scale-invariant loss: one root over all ranks, or one for each image."""

from __future__ import annotations

import math

import pretended_ranks
import pytest
import torch

from fd_large.tasks.depth.loss import silog_loss


def pair(images: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithms of predictions, and depths of which some are unknown, in float64."""
    draw = torch.Generator().manual_seed(0)
    predicted = torch.randn(images, 5, 6, generator=draw, dtype=torch.float64, requires_grad=True)
    depths = torch.rand(images, 5, 6, generator=draw, dtype=torch.float64) * 9
    return predicted, depths.where(depths > 2, 0)


def published(predicted: torch.Tensor, depths: torch.Tensor, mean_share: float) -> torch.Tensor:
    """The loss as it is written in the source."""
    known = depths > 0
    d = depths[known].log() - predicted[known]
    return (d.square().mean() - mean_share * d.mean().square()).sqrt()


@pytest.mark.parametrize("mean_share", [0.5, 0.85, 1.0])
def test_it_is_the_published_function_and_slope(mean_share):
    predicted, depths = pair()
    expected = 10 * published(predicted, depths, mean_share)
    (slope,) = torch.autograd.grad(expected, predicted)
    found = silog_loss(predicted, depths, mean_share=mean_share, factor=10)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, predicted)[0], slope)
    # Depths that are wrong by a factor cost the share that stays.
    wrong = silog_loss((2 * depths).where(depths > 0, 1).log(), depths, mean_share=mean_share)
    assert wrong.item() == pytest.approx((1 - mean_share) ** 0.5 * math.log(2), abs=1e-7)


@pytest.mark.parametrize("over", ["batch", "image"])
def test_one_pixel_is_enough(over):
    predicted, depths = pair(1)
    depths = torch.zeros_like(depths)
    depths[0, 2, 3] = 4.0
    expected = published(predicted, depths, 0.5)
    torch.testing.assert_close(silog_loss(predicted, depths, mean_share=0.5, over=over), expected)


def test_of_images_it_is_the_mean_of_their_own():
    predicted, depths = pair(3)
    depths[1] = 0
    roots = [published(predicted[i : i + 1], depths[i : i + 1], 0.5) for i in (0, 2)]
    loss = silog_loss(predicted, depths, over="image")
    torch.testing.assert_close(loss, sum(roots) / 3)
    (slope,) = torch.autograd.grad(loss, predicted)
    assert slope[1].eq(0).all()
    assert slope.isfinite().all()


@pytest.mark.parametrize("over", ["batch", "image"])
def test_without_a_depth_there_is_no_loss_and_no_slope(over):
    predicted, depths = pair()
    loss = silog_loss(predicted, depths * 0, over=over)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, predicted)[0].eq(0).all()
    # A perfect prediction has none either.
    right = depths.where(depths > 0, 1).log().requires_grad_()
    loss = silog_loss(right, depths, over=over)
    assert loss.item() == 0
    assert torch.autograd.grad(loss, right)[0].eq(0).all()


@pytest.mark.parametrize("known", [1.0, 0.0])
def test_two_ranks_are_one_though_one_has_no_depth(known, monkeypatch):
    predicted, depths = pair()
    depths[2:] *= known
    whole = silog_loss(predicted, depths)
    (expected,) = torch.autograd.grad(whole, predicted)
    world = pretended_ranks.World(monkeypatch, 2)

    def one() -> tuple[torch.Tensor, torch.Tensor]:
        mine = slice(2 * pretended_ranks.rank(), 2 * pretended_ranks.rank() + 2)
        own = predicted[mine].detach().requires_grad_()
        loss = silog_loss(own, depths[mine])
        return loss.detach(), torch.autograd.grad(loss, own)[0]

    losses, slopes = zip(*world.run(one), strict=True)
    torch.testing.assert_close(torch.stack(losses), whole.detach().expand(2))
    # The engine averages the gradients of the ranks.
    torch.testing.assert_close(torch.cat(slopes) / 2, expected)

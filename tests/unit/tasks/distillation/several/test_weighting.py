"""Which teachers are kept: the published distribution, in numbers that the losses do not change."""

from __future__ import annotations

import torch

from fd_large.tasks.distillation.several.weighting import (
    coins,
    kept_beside_worst,
    kept_of_own_data,
    weighted_loss,
)

IMAGES = 4000


def test_the_worst_is_kept_and_each_other_by_a_coin_of_its_own():
    losses = torch.rand(3, IMAGES, generator=torch.Generator().manual_seed(0))
    tossed = coins(5, 2, range(IMAGES), teachers=3, drop_probability=0.3)
    kept, worst = kept_beside_worst(losses, tossed), losses.argmax(0)
    assert kept.gather(0, worst[None]).all()
    assert torch.equal(kept.sum(0), 1 + tossed.sum(0))
    # Each teacher among the others is kept in 7 of 10 images, whichever is the worst, and two
    # others together in 49 of 100.
    for teacher in range(3):
        others = [t for t in range(3) if t != teacher]
        of = kept[others][:, worst == teacher].float()
        assert (of.mean(1) - 0.7).abs().max() < 0.05
        assert abs(of.prod(0).mean() - 0.49) < 0.05
    # As many as before, had the losses been others.
    assert torch.equal(kept_beside_worst(-losses, tossed).sum(0), kept.sum(0))


def test_coins_follow_seed_epoch_and_position_alone():
    whole = coins(5, 2, range(IMAGES), teachers=3, drop_probability=0.5)
    assert torch.equal(coins(5, 2, [7, 3], teachers=3, drop_probability=0.5), whole[:, [7, 3]])
    for other in ((6, 2), (5, 3)):
        assert not torch.equal(
            coins(*other, range(IMAGES), teachers=3, drop_probability=0.5), whole
        )


def test_images_learn_from_the_teachers_of_their_dataset():
    teaches = torch.tensor([[True, False, True], [True, True, False]])
    kept = kept_of_own_data(torch.tensor([2, 0, 1]), teaches)
    assert kept.tolist() == [[True, True, False], [False, True, True]]


def test_what_an_image_does_not_learn_may_be_infinite():
    losses = torch.tensor([[1.0, torch.inf], [3.0, 2.0]])
    kept = torch.tensor([[True, False], [True, True]])
    assert weighted_loss(losses, kept, torch.tensor(3.0), parts=1) == 2.0

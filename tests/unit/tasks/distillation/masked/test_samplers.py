"""Masks are functions of (seed, epoch, position), and hide what their samplers promise."""

from __future__ import annotations

import numpy as np
import pytest

from fd_large.tasks.distillation.masked.samplers import hidden, masks, random_masks
from fd_large.tasks.distillation.section import Mask

GRID = (14, 14)
SAMPLERS = ("random", "block", "block_exact")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_mask_depends_on_seed_epoch_and_position_alone(sampler):
    mask = Mask(sampler=sampler)
    drawn = masks(mask, GRID, 3, 1, np.arange(12))
    alone = [masks(mask, GRID, 3, 1, [position])[0] for position in (11, 5)]
    assert np.array_equal(drawn[[11, 5]], alone)
    assert len(np.unique(drawn, axis=0)) == 12
    for other in ((4, 1), (3, 2)):
        assert not np.array_equal(masks(mask, GRID, *other, np.arange(12)), drawn)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_as_many_patches_are_hidden_as_the_ratio_says(sampler):
    mask = Mask(sampler=sampler, ratio=0.4)
    counts = masks(mask, GRID, 0, 0, np.arange(300)).sum(1)
    assert counts.max() == hidden(mask, GRID)
    assert (counts.min() < counts.max()) == (sampler == "block")
    assert counts.min() > 0.85 * counts.max()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_each_image_draws_its_ratio_and_a_share_of_them_is_masked(sampler):
    mask = Mask(sampler=sampler, ratio=0.1, ratio_to=0.5, share=0.5)
    counts = masks(mask, GRID, 0, 0, np.arange(600)).sum(1)
    is_masked = counts > 0
    assert 0.43 < is_masked.mean() < 0.57
    of_masked = counts[is_masked] / (GRID[0] * GRID[1])
    assert 0.27 < of_masked.mean() < 0.33
    assert of_masked.max() <= 0.51
    assert of_masked.min() < 0.15
    assert np.array_equal(masks(mask, GRID, 0, 0, [17, 4]).sum(1), counts[[17, 4]])


@pytest.mark.parametrize("least", [16, 100])
def test_rectangles_lie_together_and_random_patches_do_not(least):
    """Also where the smallest rectangle is larger than what may be hidden."""

    def neighbours(**fields):
        drawn = masks(Mask(ratio=0.4, **fields), GRID, 0, 0, np.arange(100)).reshape(-1, *GRID)
        across = (drawn[:, :, 1:] & drawn[:, :, :-1]).sum()
        return (across + (drawn[:, 1:] & drawn[:, :-1]).sum()) / drawn.sum()

    assert neighbours(sampler="block", min_patches=least) > 1.5
    assert neighbours(sampler="random") < 0.9


def test_what_is_kept_has_the_smallest_noise():
    noise = np.array([[0.3, 0.1, 0.9, 0.2], [0.5, 0.5, 0.5, 0.5]])
    found = random_masks(noise, 2)
    assert found.tolist() == [[True, False, True, False], [False, False, True, True]]
    found = random_masks(noise, [1, 0])
    assert found.tolist() == [[False, False, True, False], [False] * 4]


def test_the_number_of_random_patches_is_the_published_one():
    """The product is rounded down as floating point has it."""
    assert hidden(Mask(sampler="random", ratio=0.75), GRID) == 147
    assert hidden(Mask(sampler="random", ratio=0.9), (2, 5)) == 10
    assert hidden(Mask(sampler="block", ratio=105 / 256), (16, 16)) == 105

"""Intervals of differences: against scipy's, how often they hold, and what copies come out as."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

from fd_large.probes.paired import _degrees, difference, difference_of_redrawn, student_t
from fd_large.probes.redrawn import Redrawn, redraws


def drawn(seed: int, seeds: int, images: int, accuracies: tuple[float, float], *, spread=0.0):
    """Two models whose images are hard and easy alike; seeds move a model's accuracy."""
    rng = np.random.default_rng(seed)
    hardness = rng.random(images)
    found = []
    for accuracy in accuracies:
        of_seeds = accuracy + spread * rng.standard_normal((seeds, 1))
        found.append((hardness < of_seeds) ^ (rng.random((seeds, images)) < 0.1))
    return found


def test_the_part_of_images_is_scipys_paired_bootstrap():
    one, other = drawn(0, 3, 2000, (0.60, 0.57))
    found = difference(one, other)
    gaps = 100 * (one.mean(0) - other.mean(0))
    assert found.mean == pytest.approx(gaps.mean())
    theirs = scipy.stats.bootstrap(
        (gaps,), np.mean, n_resamples=5000, method="percentile", random_state=1
    ).confidence_interval
    # Both are draws: their ends spread by some hundredths of a point.
    assert found.of_images == pytest.approx(tuple(theirs), abs=0.1)


def test_the_part_of_seeds_is_scipys_welch():
    rng = np.random.default_rng(0)
    # Images of one kind: whichever are drawn, the accuracies stay.
    rates = [rng.random((3, 1)), rng.random((4, 1))]
    one, other = (np.repeat(rate, 500, axis=1) for rate in rates)
    found = difference(one, other)
    assert found.of_images == pytest.approx((found.mean, found.mean))
    theirs = scipy.stats.ttest_ind(*(100 * rate[:, 0] for rate in rates), equal_var=False)
    variances = [100**2 * rate.var(ddof=1) / len(rate) for rate in rates]
    assert _degrees(variances, (3, 4)) == pytest.approx(theirs.df)
    half = scipy.stats.t.ppf(0.975, int(theirs.df)) * sum(variances) ** 0.5
    assert found.high - found.mean == pytest.approx(half, rel=1e-3)
    assert found.low < theirs.confidence_interval().low < theirs.confidence_interval().high
    assert [student_t(n) for n in (1, 2.9, 1e9)] == [12.706, 4.303, 2.179]


def test_nineteen_of_twenty_intervals_hold_the_truth():
    held = sum(
        found.low <= 3.0 * 0.8 <= found.high
        for seed in range(100)
        for found in [difference(*drawn(seed, 3, 1000, (0.60, 0.57), spread=0.01))]
    )
    # 100 trials with probability .95 give fewer than 88 twice in a thousand times.
    assert held >= 88


def test_images_alone_are_not_enough_where_seeds_move_a_model():
    """Equal models, three seeds each, of a spread as that of small trainings."""
    found = [difference(*drawn(seed, 3, 10_000, (0.6, 0.6), spread=0.01)) for seed in range(60)]
    of_images = sum(one.of_images[0] > 0 or one.of_images[1] < 0 for one in found)
    assert of_images > 12, "more than one of five is called different"
    assert sum(one.excludes_zero for one in found) <= 6


def test_equal_models_differ_by_nothing():
    one, _ = drawn(0, 2, 100, (0.6, 0.6))
    found = difference(one, one)
    assert (found.mean, found.of_images) == (0.0, (0.0, 0.0))
    assert not found.excludes_zero
    with pytest.raises(ValueError, match="got 100 and 50"):
        difference(one, one[:, :50])


def test_one_seed_says_nothing_of_seeds():
    one, other = drawn(0, 1, 2000, (0.7, 0.5))
    found = difference(one, other)
    assert not found.holds_seeds
    assert (found.low, found.high) == found.of_images
    assert not difference(np.repeat(one, 2, axis=0), other).holds_seeds


def test_scores_of_the_same_draws_are_compared():
    """A score that is a mean after all: the interval is that of means."""
    one, other = drawn(0, 3, 2000, (0.60, 0.57), spread=0.005)
    counts = redraws(2000)
    assert (counts.sum(1) == 2000).all()
    assert (counts == redraws(2000)).all()
    of_draws = [
        [Redrawn("a", 100 * seed.mean(), 100 * (counts @ seed) / 2000) for seed in scored]
        for scored in (one, other)
    ]
    found, usual = difference_of_redrawn(*of_draws), difference(one, other)
    assert found.mean == pytest.approx(usual.mean)
    # 200 draws say the half width to 5 per cent.
    assert found.of_images == pytest.approx(usual.of_images, abs=0.2)
    assert (found.low, found.high) == pytest.approx((usual.low, usual.high), abs=0.2)
    elsewhere = [one._replace(images="b") for one in of_draws[1]]
    assert difference_of_redrawn(of_draws[0], elsewhere) is None


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))


def fine_tuned(start: nn.Module, images, labels, seed: int) -> nn.Module:
    """Trains a copy with a new classifier; the seed draws it and the order of the images."""
    model = network(seed)
    model[0].load_state_dict(start[0].state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for batch in torch.randperm(len(images)).split(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model


def test_a_copy_with_other_seeds_is_not_shown_and_noise_in_its_weights_is_worse():
    """Real trainings: a small teacher, a copy of it, and a copy with noise in its weights."""
    torch.manual_seed(0)
    pattern = nn.Sequential(nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
    images = torch.randn(6000, 16)
    with torch.no_grad():
        labels = (6 * pattern(images) + 0.1 * torch.randn(6000, 4)).argmax(1)
    teacher = network(1)
    for epoch in range(8):
        teacher = fine_tuned(teacher, images[:3000], labels[:3000], epoch)
    copies, noisy = [], []
    for draw in range(10):
        torch.manual_seed(100 + draw)
        noise = network(0)
        noise.load_state_dict(teacher.state_dict())
        with torch.no_grad():
            for parameter in noise.parameters():
                parameter += 1.5 * parameter.std() * torch.randn_like(parameter)
        right = []
        for row, start in enumerate((teacher, teacher, noise)):
            seeds = range(1000 * draw + 10 * row, 1000 * draw + 10 * row + 4)
            trained = [fine_tuned(start, images[3000:3500], labels[3000:3500], s) for s in seeds]
            with torch.no_grad():
                found = [model(images[4000:]).argmax(1) == labels[4000:] for model in trained]
            right.append(torch.stack(found).numpy())
        copies.append(difference(right[1], right[0]))
        noisy.append(difference(right[2], right[0]))
    assert sum(not one.excludes_zero for one in copies) >= 9
    assert all(one.high < 0 for one in noisy)

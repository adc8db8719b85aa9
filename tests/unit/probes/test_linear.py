"""The linear probe: rates do not meet, the held-out tenth chooses, the test is one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fd_large.data.centre_crops import NO_LABEL
from fd_large.data.sampler import epoch_order
from fd_large.errors import DataError
from fd_large.probes import linear
from fd_large.probes.features import Features

CLASSES, WIDTH = 4, 12


def blobs(count: int, seed: int, noise: float = 1.0) -> Features:
    """Gaussian classes on very different scales, which the norm evens out."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, WIDTH)) * 1.5
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    rows = centres[labels] + noise * rng.normal(size=(count, WIDTH))
    return Features((rows * np.logspace(-2, 2, WIDTH) + 3).astype(np.float32), labels)


def test_it_learns_and_the_best_rate_is_chosen():
    # So high a rate that the last batches decide, and a fit one.
    probe = linear.Probe(rates=(3e4, 0.1), epochs=8, batch_size=16)
    outcome = linear.evaluate(
        blobs(600, 1, 3.0), blobs(4000, 2, 3.0), num_classes=CLASSES, probe=probe
    )
    assert outcome.rate == 0.1
    assert outcome.held_out[1] > outcome.held_out[0]
    centres = np.random.default_rng(0).normal(size=(CLASSES, WIDTH)) * 1.5
    test = blobs(4000, 2, 3.0)
    rows = (test.rows - 3) / np.logspace(-2, 2, WIDTH)
    # Nobody can do better than who knows the centres.
    nearest = (rows @ centres.T - (centres**2).sum(1) / 2).argmax(1)
    best = 100 * (nearest == test.labels).mean()
    assert best - 5 < test.percent(outcome.predicted) < best + 1


def test_rates_together_are_rates_alone():
    train, probe = blobs(200, 1), linear.Probe(epochs=2, batch_size=32)
    numbers = np.arange(200)
    together = linear._fit(train, numbers, CLASSES, probe, (0.01, 0.3), lambda count: None)
    for place, rate in enumerate((0.01, 0.3)):
        alone = linear._fit(train, numbers, CLASSES, probe, (rate,), lambda count: None)
        assert torch.allclose(together.weight[place], alone.weight[0], atol=1e-6)
        assert torch.allclose(together.bias[place], alone.bias[0], atol=1e-6)


def test_an_update_is_sgd_with_momentum_on_normed_rows():
    train, size, rate = blobs(128, 1), 32, 0.1
    probe = linear.Probe(epochs=2, batch_size=size, seed=3)
    found = linear._fit(train, np.arange(128), CLASSES, probe, (rate,), lambda count: None)
    norm = torch.nn.BatchNorm1d(WIDTH, affine=False, eps=linear.NORM_EPS)
    layer = torch.nn.Linear(WIDTH, CLASSES)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
    update = 0
    for epoch in (1, 2):
        for start in range(0, 128, size):
            chosen = epoch_order(128, 3, epoch, np.arange(start, start + size))
            rows, labels = (torch.from_numpy(part[chosen]) for part in train)
            loss = torch.nn.functional.cross_entropy(layer(norm(rows)), labels)
            optimizer.zero_grad()
            loss.backward()
            cosine = 0.5 * (1 + math.cos(math.pi * update / 8))
            optimizer.param_groups[0]["lr"] = rate * size / 256 * cosine
            optimizer.step()
            update += 1
    assert torch.allclose(found.weight[0], layer.weight, atol=1e-6)
    assert torch.allclose(found.bias[0, 0], layer.bias, atol=1e-6)
    assert torch.allclose(found.mean, norm.running_mean, rtol=1e-5)
    assert torch.allclose(found.variance, norm.running_var, rtol=1e-5)


def test_pictures_without_a_label_are_left_out():
    train, test = blobs(300, 1), blobs(100, 2)
    broken = train.labels.copy()
    broken[::3] = NO_LABEL
    probe = linear.Probe(rates=(0.1,), epochs=2, batch_size=32)
    found = linear.evaluate(Features(train.rows, broken), test, num_classes=CLASSES, probe=probe)
    kept = np.flatnonzero(broken != NO_LABEL)
    alone = Features(train.rows[kept], train.labels[kept])
    expected = linear.evaluate(alone, test, num_classes=CLASSES, probe=probe)
    assert found[:2] == expected[:2]
    assert (found.predicted == expected.predicted).all()


def test_what_is_told_adds_up_to_the_work():
    told: list[int] = []
    probe = linear.Probe(rates=(0.1,), epochs=3, batch_size=9)
    linear.evaluate(
        blobs(90, 1), blobs(9, 2), num_classes=CLASSES, probe=probe, progress=told.append
    )
    assert sum(told) == linear.work(90, probe)


@pytest.mark.parametrize(
    ("images", "steps"), [(9, 4 * 30), (120, 4 * 30), (1024, 4 * 30), (1_281_167, 5004 * 30)]
)
def test_an_epoch_of_few_images_has_four_batches(images, steps):
    assert linear.steps(images, linear.Probe()) == steps


def test_few_steps_are_warned_of_with_the_epochs_that_suffice(caplog):
    linear.warn_of_few_steps(120, linear.Probe())
    (warned,) = caplog.messages
    assert "makes only 120 steps on 120 training images" in warned
    assert warned.endswith("with --probe_epochs 125 it makes 500")
    assert linear.steps(120, linear.Probe(epochs=125)) == 500
    linear.warn_of_few_steps(120, linear.Probe(epochs=125))
    linear.warn_of_few_steps(50_000, linear.Probe())
    assert len(caplog.messages) == 1


def test_too_few_pictures_are_refused():
    with pytest.raises(DataError, match=r"^data\.root: .*got 9, .* 10"):
        linear.evaluate(blobs(9, 1), blobs(9, 2), num_classes=CLASSES, probe=linear.Probe(epochs=1))

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_large.data.random_numbers import STREAMS, drop_path_keep, philox, random_words, uniforms

F = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((F, F, F, F), (F, F), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(counter, key, expected):
    words = philox([np.array([word], dtype=np.uint64) for word in counter], key)
    assert tuple(int(word[0]) for word in words) == expected


@settings(deadline=None, max_examples=50)
@given(
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
    position=st.integers(0, 2**63 - 1),
    count=st.integers(1, 40),
)
def test_a_row_depends_on_its_own_place_alone(seed, epoch, position, count):
    alone = uniforms(seed, epoch, [position], "view", count)
    among = uniforms(seed, epoch, [7, position, 2**40], "view", count + 5)
    assert alone.shape == (1, count)
    assert alone.dtype == np.float64
    np.testing.assert_array_equal(alone[0], among[1, :count])
    assert ((alone >= 0) & (alone < 1)).all()


def test_every_part_of_the_place_changes_the_numbers():
    rows = [
        uniforms(seed, epoch, [position], stream, 4)[0]
        for seed in (0, 1, 2**32)
        for epoch in (0, 1)
        for position in (0, 1, 2**32)
        for stream in (*STREAMS, 200)
    ]
    assert len(np.unique(np.concatenate(rows))) == 4 * len(rows)


def test_blocks_of_a_stream_continue_each_other():
    whole = random_words(3, 1, [5, 6], "order", num_blocks=6)
    np.testing.assert_array_equal(
        whole[:, 4:], random_words(3, 1, [5, 6], "order", first_block=4, num_blocks=2)
    )


def test_numbers_are_uniform_and_uncorrelated_along_every_axis():
    numbers = np.stack([uniforms(0, epoch, np.arange(500), "view", 40) for epoch in range(10)])
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    expected = numbers.size / 100
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 99 + 4 * np.sqrt(2 * 99)  # mean and spread of 99 degrees of freedom
    centred = (numbers - 0.5) * np.sqrt(12)
    for axis in range(3):
        near = np.moveaxis(centred, axis, 0)
        correlation = (near[1:] * near[:-1]).mean()
        assert abs(correlation) < 4 / np.sqrt(near[1:].size)


def test_no_numbers_and_no_positions_are_fine():
    assert uniforms(0, 0, [1, 2], "view", 0).shape == (2, 0)
    assert uniforms(0, 0, [], "view", 3).shape == (0, 3)


def test_drop_path_is_the_same_however_positions_are_grouped():
    rates = [0.0, 0.1, 0.3, 0.5]
    whole = drop_path_keep(rates, 5, 2, torch.arange(60))
    assert whole.shape == (4, 60)
    assert whole.dtype == torch.bool
    for size in (1, 7, 20):
        pieces = [drop_path_keep(rates, 5, 2, piece) for piece in torch.arange(60).split(size)]
        assert torch.equal(torch.cat(pieces, dim=1), whole)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drop_path_keep(rates, 5, 2, order), whole[:, order])


def test_drop_path_keeps_at_its_rate_and_independently():
    rates = [0.0, 0.1, 0.3, 0.3, 0.9, 1.0]
    num = 20_000
    keep = drop_path_keep(rates, 0, 0, np.arange(num)).double().numpy()
    for site, rate in enumerate(rates):
        spread = np.sqrt(rate * (1 - rate) / num)
        assert abs(keep[site].mean() - (1 - rate)) <= 4 * spread
    inner = keep[1:5]
    correlation = np.corrcoef(inner)
    assert np.abs(correlation - np.eye(len(inner))).max() < 4 / np.sqrt(num)
    shifted = [np.corrcoef(row[1:], row[:-1])[0, 1] for row in inner]
    assert np.abs(shifted).max() < 4 / np.sqrt(num)


def test_drop_path_does_not_touch_torchs_generator():
    before = torch.get_rng_state()
    drop_path_keep([0.5], 0, 0, [0, 1])
    assert torch.equal(torch.get_rng_state(), before)

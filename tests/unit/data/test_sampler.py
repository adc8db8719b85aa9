from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd_large.data.sampler import (
    Blocks,
    MicroBatches,
    Portion,
    check_batch_sizes,
    epoch_order,
    updates_per_epoch,
)
from fd_large.errors import ConfigError, DataError


@settings(deadline=None, max_examples=150)
@given(num=st.integers(1, 5000), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 2**32 - 1))
def test_an_epoch_is_a_permutation(num, seed, epoch):
    order = epoch_order(num, seed, epoch, np.arange(num))
    np.testing.assert_array_equal(np.sort(order), np.arange(num))


@pytest.mark.parametrize("num", [*range(1, 66), 1_281_167])
def test_an_epoch_of_this_size_is_a_permutation(num):
    order = epoch_order(num, 0, 1, np.arange(num))
    assert np.bincount(order, minlength=num).max() == 1
    assert order.max() == num - 1


def test_a_position_is_looked_up_alone():
    whole = epoch_order(1000, 3, 7, np.arange(1000))
    for position in (0, 1, 500, 999):
        assert epoch_order(1000, 3, 7, [position]) == whole[position]


def test_the_order_of_a_seed_stays_what_it_was():
    """A run that resumes under a later version must find the order it began with."""
    order = epoch_order(1_281_167, 0, 3, [0, 1, 2, 1_281_166])
    assert order.tolist() == [203342, 1220322, 217925, 793059]


def test_positions_are_left_as_they_were():
    positions = np.arange(10)
    epoch_order(10, 0, 0, positions)
    np.testing.assert_array_equal(positions, np.arange(10))


def test_a_set_too_large_for_any_list_costs_nothing():
    num = 10**15
    order = epoch_order(num, 0, 0, [0, 1, num - 1])
    assert len(set(order.tolist())) == 3
    assert ((order >= 0) & (order < num)).all()


def test_epochs_and_seeds_differ():
    orders = [epoch_order(1000, s, e, np.arange(1000)) for s, e in ((0, 0), (0, 1), (1, 0))]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert (orders[first] == orders[second]).sum() < 10  # one is expected


@pytest.mark.parametrize("num", [2, 7, 20])
def test_every_sample_is_equally_likely_at_every_place(num):
    epochs = 400
    counts = np.zeros((num, num))
    for epoch in range(epochs):
        counts[np.arange(num), epoch_order(num, 0, epoch, np.arange(num))] += 1
    chi_squared = ((counts - epochs / num) ** 2 / (epochs / num)).sum()
    freedom = (num - 1) ** 2
    assert chi_squared < freedom + 4 * np.sqrt(2 * freedom)


def test_every_order_of_four_is_equally_likely():
    epochs = 960
    orders = [tuple(epoch_order(4, 0, epoch, np.arange(4))) for epoch in range(epochs)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    chi_squared = ((counts - epochs / 24) ** 2 / (epochs / 24)).sum()
    assert chi_squared < 23 + 4 * np.sqrt(2 * 23)


def test_neighbours_and_halves_of_an_order_are_unrelated():
    num = 5003
    lags = []
    for epoch in range(20):
        order = epoch_order(num, 0, epoch, np.arange(num)) / num - 0.5
        lags.append([(order[lag:] * order[:-lag]).mean() * 12 for lag in (1, 2, 70, 71, 72)])
        drift = np.corrcoef(order, np.arange(num))[0, 1]
        assert abs(drift) < 4.5 / np.sqrt(num)
    assert np.abs(np.mean(lags, axis=0)).max() < 4 / np.sqrt(20 * num)


def test_neighbours_step_as_in_a_true_shuffle():
    """The difference of neighbours mod n: a weak Feistel network repeats some far too often."""
    num, epochs, bins = 1024, 200, 64
    counts = np.zeros(bins)
    for epoch in range(epochs):
        order = epoch_order(num, 1, epoch, np.arange(num))
        counts += np.bincount((np.diff(order) % num) * bins // num, minlength=bins)
    expected = np.full(bins, counts.sum() / (num - 1) * (num / bins))
    expected[0] -= counts.sum() / (num - 1)  # a difference of 0 cannot be
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < bins - 1 + 4 * np.sqrt(2 * (bins - 1))


@settings(deadline=None, max_examples=60)
@given(
    world_size=st.integers(1, 5),
    micro_batch_size=st.integers(1, 6),
    accumulation=st.integers(1, 4),
    updates=st.integers(1, 4),
)
def test_ranks_share_each_global_batch(world_size, micro_batch_size, accumulation, updates):
    size = world_size * micro_batch_size * accumulation
    for update in range(updates):
        parts = []
        for rank in range(world_size):
            portion = Portion(0, update, micro_batch_size, rank, world_size)
            batches = MicroBatches(updates * size + size - 1, portion, size)
            assert len(batches) == len(list(batches)) == accumulation * (updates - update)
            parts += list(batches)[:accumulation]
        assert {part.shape for part in parts} == {(micro_batch_size,)}
        np.testing.assert_array_equal(
            np.concatenate(parts), np.arange(update * size, (update + 1) * size)
        )


def test_the_rest_of_an_epoch_is_dropped():
    assert updates_per_epoch(100, 32) == 3
    assert updates_per_epoch(96, 32) == 3
    assert updates_per_epoch(31, 32) == 0


@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ((50, 64, 8, 2), DataError, r"64 and 50 images .*global_batch_size to 48 or less"),
        ((5, 64, 8, 2), DataError, r"64 and 5 images .*or lower --batch\.micro_batch_size"),
        ((1000, 100, 4, 3), ConfigError, r"multiple of 12"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(sizes, error, message):
    num, global_batch_size, micro_batch_size, world_size = sizes
    with pytest.raises(error, match=message):
        check_batch_sizes(
            num,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            world_size=world_size,
        )


def test_sizes_that_fit_pass():
    check_batch_sizes(64, global_batch_size=64, micro_batch_size=8, world_size=2)


def blocks_of(*sizes):
    return Blocks(np.cumsum(sizes))


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=40),
    per_window=st.integers(1, 9),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**32 - 1),
)
def test_an_epoch_over_blocks_is_a_permutation_of_few_blocks_at_a_time(
    sizes, per_window, seed, epoch
):
    blocks = blocks_of(*sizes)
    blocks.per_window = per_window
    num = sum(sizes)
    order = blocks.order(seed, epoch, np.arange(num))
    np.testing.assert_array_equal(np.sort(order), np.arange(num))
    # Alone, a position has the sample that it has among all, from a block that is expected.
    place = num // 3
    assert blocks.order(seed, epoch, np.array([place])) == order[place]
    assert blocks.block(int(order[place]))[0] in blocks.ahead(seed, epoch, place)[:per_window]
    # No block comes back once its window is over.
    of = [blocks.block(sample)[0] for sample in order.tolist()]
    first = {block: at for at, block in reversed(list(enumerate(of)))}
    last = {block: at for at, block in enumerate(of)}
    for at in range(num):
        assert sum(first[b] <= at <= last[b] for b in range(len(sizes))) <= per_window


def test_blocks_come_in_another_order_each_epoch_and_are_mixed_within_a_window():
    blocks = blocks_of(*[500] * 60)
    assert blocks.per_window == 20  # 10,000 samples
    orders = [blocks.order(s, e, np.arange(30_000)) for s, e in ((0, 0), (0, 1), (1, 0))]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert (orders[a] == orders[b]).sum() < 40  # few by chance
    assert len(set((orders[0][:200] // 500).tolist())) > 15
    assert (np.diff(orders[0]) == 1).sum() < 40


def test_the_order_over_blocks_of_a_seed_stays_what_it_was():
    order = blocks_of(*[100, 250, 7] * 200).order(3, 1, np.array([0, 1, 40_000, 71_399]))
    assert order.tolist() == [33083, 67272, 51722, 15037]


def test_what_is_expected_goes_on_in_the_next_epoch():
    blocks = blocks_of(*[1000] * 40)
    assert blocks.per_window == 10
    first = blocks.ahead(0, 1, 0)
    assert len(first) == 20
    assert set(first[:10]) <= set(blocks.ahead(0, 0, 39_999))


def test_a_stand_in_is_of_the_same_window():
    blocks = blocks_of(*[1000] * 40)
    window = set(blocks.order(0, 0, np.arange(10_000)).tolist())
    drawn = {blocks.stand_in(0, 0, 123, draw) for draw in np.linspace(0, 0.9999, 50)}
    assert len(drawn) == 50
    assert drawn <= window

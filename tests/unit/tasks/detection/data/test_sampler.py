from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd_large.tasks.detection.data.sampler import grouped_order


@given(
    num_landscape=st.integers(0, 60),
    num_portrait=st.integers(0, 60),
    global_batch_size=st.integers(1, 16),
    epoch=st.integers(0, 3),
)
def test_batches_hold_one_orientation_and_nearly_all_samples_once(
    num_landscape, num_portrait, global_batch_size, epoch
):
    landscape = np.arange(num_landscape + num_portrait) < num_landscape
    num_updates = len(landscape) // global_batch_size
    if not num_updates:
        return
    order = grouped_order(landscape, 0, epoch, global_batch_size)
    assert len(order) == num_updates * global_batch_size
    batches = order.reshape(num_updates, global_batch_size)
    assert all(len(set(landscape[batch].tolist())) == 1 for batch in batches)
    again = len(order) - len(np.unique(order))
    assert again < global_batch_size


def test_orders_differ_by_epoch_and_seed_and_mix_orientations():
    landscape = np.random.default_rng(0).random(400) < 0.7
    first = grouped_order(landscape, 0, 0, 8)
    np.testing.assert_array_equal(first, grouped_order(landscape, 0, 0, 8))
    for seed, epoch in ((0, 1), (1, 0)):
        assert (first != grouped_order(landscape, seed, epoch, 8)).mean() > 0.9
    wide = landscape[first.reshape(-1, 8)[:, 0]]
    for half in (wide[:25], wide[25:]):  # neither orientation waits for the end
        assert half.mean() == pytest.approx(0.7, abs=0.2)
    assert np.abs(np.corrcoef(first, np.arange(len(first)))[0, 1]) < 0.15

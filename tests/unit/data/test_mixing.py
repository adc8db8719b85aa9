"""Who is mixed with whom, and views that are mixed whatever the division into batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pictures import write_pictures

from fd_large.data.folder import ImageFolder
from fd_large.data.loader import ViewBatches
from fd_large.data.mixing import group_starts, partners, with_partners
from fd_large.data.views import ViewSettings


@pytest.mark.parametrize("size", [1, 2, 6, 7])
def test_partners_are_pairs_inside_a_global_batch(size):
    positions = np.arange(4 * size)
    other = partners(positions, size)
    assert (other // size == positions // size).all()
    assert (partners(other, size) == positions).all()
    alone = positions[other == positions]
    assert len(alone) == (4 if size % 2 else 0)


@pytest.mark.parametrize(
    ("positions", "behind"),
    [
        ([4, 9, 2], [3, 5, 10]),  # No partner is there.
        ([11, 7, 10, 12], [8, 9]),  # The partner of 11 is there. A global batch begins at 7.
        ([3, 2, 0, 1], []),
        ([6, 13], []),  # The odd one out of each global batch is its own partner.
    ],
)
def test_partners_that_are_not_there_come_behind_once(positions, behind):
    given = np.array(positions)
    every, places = with_partners(given, 7)
    assert every.tolist() == positions + behind
    assert (every[places.numpy()] == partners(given, 7)).all()


@pytest.mark.parametrize("size", [96, 128, 200, 256, 300])
def test_groups_are_of_128_positions_of_a_global_batch(size):
    positions = np.arange(3 * size)
    starts = group_starts(positions, size)
    expected = [
        range(first, min(first + 128, batch + size))
        for batch in range(0, 3 * size, size)
        for first in range(batch, batch + size, 128)
    ]
    assert [list(np.flatnonzero(starts == one[0])) for one in expected] == list(map(list, expected))
    # Who is mixed with whom stays within.
    assert (starts[partners(positions, size)] == starts).all()


def test_views_are_mixed_by_their_position_alone(tmp_path):
    folder, settings = ImageFolder(str(write_pictures(tmp_path, 9))), ViewSettings(16, 0.5)
    plain = ViewBatches(folder, settings, 3, 1)
    mixing = ViewBatches(folder, settings, 3, 1, mixed_among=7)
    positions = np.arange(7)
    whole, alone = mixing[positions], plain[positions].images.float()
    assert whole.images.dtype == torch.uint8
    for part in positions.reshape(-1, 1):
        batch = mixing[part]
        assert torch.equal(batch.images[0], whole.images[part[0]])
        assert batch.indices.tolist() == [whole.indices[part[0]]]
        assert batch.positions.tolist() == part.tolist()
    # A pair's two mixes add up to its two views, and the odd one out is as it was.
    both = whole.images.float()
    assert (both[:6].unflatten(0, (3, 2)) - alone[:6].unflatten(0, (3, 2))).sum(1).abs().max() <= 1
    assert (both[:6] - alone[:6]).abs().max() > 8
    assert torch.equal(both[6], alone[6])

from __future__ import annotations

import numpy as np
import pytest
import torch

from fd_large.tasks.dense.geometry import View, padded, resized_view, sizes_of, whole_view


@pytest.mark.parametrize(
    ("size", "short_side", "long_side", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((300, 900), 800, 1333, (444, 1333)),
        ((427, 640), 1024, 1024, (683, 1024)),
        ((1, 900), 800, 1333, (1, 1333)),
    ],
)
def test_resizing_by_the_shortest_edge(size, short_side, long_side, expected):
    view = resized_view(*size, short_side=short_side, long_side=long_side)
    assert view.resized == view.size == expected


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("resized", [(120, 160), (60, 80), (181, 240)])
def test_pixels_masks_and_points_move_together(resized, flipped):
    view = View((120, 160), resized, (7, 5, 50, 70), flipped)
    mask = np.zeros((120, 160), dtype=np.uint8)
    mask[30:60, 40:100] = 1
    image = torch.from_numpy(mask).expand(3, -1, -1) * 255
    bright = view.image(image)
    assert bright.dtype == torch.uint8
    assert bright.shape == (3, *view.size)
    moved = view.mask(mask)
    assert (moved != (bright[0] >= 128).numpy()).sum() <= sum(view.size)
    corners = np.sort(view.points(np.array([[40, 30], [100, 60]], dtype=float)), axis=0)
    left, top, right, bottom = np.clip(corners, 0, view.size[::-1]).reshape(-1)
    rows, columns = np.flatnonzero(moved.any(1)), np.flatnonzero(moved.any(0))
    bounds = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose([left, top, right, bottom], bounds, atol=1.01)


def test_a_whole_view_changes_nothing():
    image = torch.arange(2 * 3, dtype=torch.uint8).view(1, 2, 3).repeat(3, 1, 1)
    assert torch.equal(whole_view(2, 3).image(image), image)


def test_padding_is_black_at_the_bottom_and_the_right():
    image = torch.ones(3, 2, 3, dtype=torch.uint8)
    whole = padded(image, (4, 5))
    assert whole.shape == (3, 4, 5)
    assert whole.sum() == image.sum() == whole[:, :2, :3].sum()
    assert padded(torch.zeros(0, 0, 0), (4, 5)).shape == (0, 4, 5)
    assert sizes_of([image, whole]).tolist() == [[2, 3], [4, 5]]

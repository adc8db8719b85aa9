from __future__ import annotations

import pytest
import torch

from fd_large.kernels.attention import PADDING, region_mask
from fd_large.models.windows import (
    coordinate_table,
    fit_window,
    in_windows,
    position_index,
    region_ids,
    window_shift,
)

CPU = torch.device("cpu")


def test_window_shrinks_to_the_shorter_side_and_drops_the_shift():
    assert fit_window(6, 9, 12) == 6
    assert window_shift(6, 9, 6, 1) == 0
    assert window_shift(12, 12, 6, 0) == 0
    assert window_shift(12, 12, 6, 1) == 3
    assert window_shift(9, 9, 3, 1) == 1


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("size", [(8, 12), (9, 7), (5, 11)])
def test_windows_go_back_where_they_came_from(size, shift):
    x = torch.randn(2, *size, 3)
    seen = []

    def attend(groups, regions):
        seen.append(groups.shape)
        return groups * 2

    torch.testing.assert_close(in_windows(x, 4, shift, attend), x * 2)
    rows, columns = -(-size[0] // 4), -(-size[1] // 4)
    assert seen == [(2 * rows * columns, 16, 3)]


def test_shift_mask_hides_what_was_no_neighbour():
    mask = region_mask(region_ids(8, 8, 4, 2, CPU), torch.float32)
    # Zeros of 256 in each window, as measured on the published mask.
    assert [(m == 0).sum().item() for m in mask] == [256, 128, 128, 64]


def test_padding_has_an_id_of_its_own():
    ids = region_ids(3, 5, 4, 0, CPU).view(1, 2, 4, 4)
    assert (ids[0, :, 3] == PADDING).all()
    assert (ids[0, 1, :, 1:] == PADDING).all()
    assert (ids[0, 0, :3] == 0).all()


@pytest.mark.parametrize(("height", "width"), [(5, 7), (9, 6), (13, 21)])
def test_no_window_is_padding_alone(height, width):
    for shift in (0, 2):
        assert (region_ids(height, width, 4, shift, CPU) != PADDING).any(dim=1).all()


def test_position_index_counts_offsets():
    w = 3
    index = position_index(w, CPU)
    for query in range(w * w):
        for key in range(w * w):
            dy, dx = query // w - key // w, query % w - key % w
            assert index[query, key] == (dy + w - 1) * (2 * w - 1) + dx + w - 1


@pytest.mark.parametrize(
    ("window", "pretrained", "largest"), [(14, 0, 1.0566), (14, 12, 1.1287), (24, 12, 1.3826)]
)
def test_coordinates_reach_the_measured_range(window, pretrained, largest):
    table = coordinate_table(window, pretrained, CPU)
    assert table.shape == ((2 * window - 1) ** 2, 2)
    assert table.dtype == torch.float32
    assert abs(table.max().item() - largest) < 1e-4
    assert table.min() == -table.max()


@pytest.mark.parametrize("pretrained", [0, 1, 12])
def test_window_of_one_token_has_the_coordinate_zero(pretrained):
    assert coordinate_table(1, pretrained, CPU).tolist() == [[0.0, 0.0]]
    assert torch.isfinite(coordinate_table(3, pretrained, CPU)).all()


def test_tables_made_under_inference_mode_serve_training():
    position_index.cache_clear()
    coordinate_table.cache_clear()
    with torch.inference_mode():
        index, table = position_index(5, CPU), coordinate_table(5, 0, CPU)
    assert not index.is_inference()
    assert not table.is_inference()

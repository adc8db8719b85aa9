from __future__ import annotations

import pytest
import torch

from fd_large.backbones.windows import (
    coordinate_table,
    fit_window,
    window_shift,
)

CPU = torch.device("cpu")


def test_window_shrinks_to_the_shorter_side_and_drops_the_shift():
    assert fit_window(6, 9, 12) == 6
    assert window_shift(6, 9, 6, 1) == 0
    assert window_shift(12, 12, 6, 0) == 0
    assert window_shift(12, 12, 6, 1) == 3
    assert window_shift(9, 9, 3, 1) == 1


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
    coordinate_table.cache_clear()
    with torch.inference_mode():
        table = coordinate_table(5, 0, CPU)
    assert not table.is_inference()

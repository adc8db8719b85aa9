from __future__ import annotations

import pytest
import torch

from fd_large.backbones.windows import StageWindows, coordinate_table

CPU = torch.device("cpu")


def test_window_shrinks_to_the_shorter_side_and_drops_the_shift():
    assert StageWindows(12).over(6, 9, 1) == (6, 0, 0, 0)
    assert StageWindows(6).over(6, 9, 1) == (6, 0, 0, 0)
    assert StageWindows(6).over(12, 12, 0) == (6, 0, 0, 0)
    assert StageWindows(6).over(12, 12, 1) == (6, 3, 0, 0)
    assert StageWindows(3).over(9, 9, 1) == (3, 1, 0, 0)


def test_official_windows_keep_side_and_shift_and_fill_the_map_up():
    windows = StageWindows(6, rule="official").over(5, 9, 1)
    assert windows == (6, 3, 1, 3)
    x = torch.randn(1, 5, 9, 2)
    assert windows.pad(x).shape == (1, 6, 12, 2)
    assert torch.equal(windows.crop(windows.pad(x)), x)
    assert StageWindows(6, shifts=False, rule="official").over(12, 6, 1) == (6, 0, 0, 0)


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

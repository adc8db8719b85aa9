from __future__ import annotations

import numpy as np
import pytest
import torch

from fd_large.backbones.position_tables import (
    fit_offsets,
    progression,
    resize_positions,
    resize_table,
    spline_matrix,
    square_side,
)
from fd_large.errors import WeightsError


def test_offsets_stay_in_smaller_grids_and_stretch_in_larger_ones():
    down, across = torch.meshgrid(torch.arange(-3.0, 4), torch.arange(-3.0, 4), indexing="ij")
    table = torch.stack([down.abs() + across.abs(), across], dim=-1).reshape(-1, 2)
    assert fit_offsets(table, (4, 4), (4, 4)) is table
    inner = fit_offsets(table, (4, 4), (2, 3)).view(3, 5, 2)
    assert torch.equal(inner[..., 1], torch.arange(-2.0, 3).expand(3, 5))
    assert torch.equal(inner[0, :, 0], torch.tensor([3.0, 2, 1, 2, 3]))
    table = table.requires_grad_()
    outer = fit_offsets(table, (4, 4), (5, 4)).view(9, 7, 2)
    torch.testing.assert_close(outer[..., 1], torch.arange(-3.0, 4).expand(9, 7))
    # Near offsets nearly keep their value, and the farthest have that of the farthest known.
    distance = outer[:, 3, 0]
    torch.testing.assert_close(distance, distance.flip(0))
    assert distance[4].abs() < 1e-6
    assert distance[5].item() == pytest.approx(1, abs=1e-6)
    assert distance[8].item() == pytest.approx(3, abs=1e-4)
    assert (distance[4:].diff() > 0).all()
    outer.sum().backward()
    assert table.grad.abs().sum() > 0


@pytest.mark.parametrize("knots", [5, 6, 13, 27])
def test_a_cubic_polynomial_is_met_exactly(knots):
    """A not-a-knot spline through a cubic is that cubic; one with other ends is not."""
    at = progression(knots, knots + 10)
    points = np.linspace(at[0], at[-1], 31)

    def cubic(x):
        return 1 - 2 * x + 0.3 * x**2 - 0.05 * x**3

    got = spline_matrix(at, points) @ cubic(at)
    assert np.abs(got - cubic(points)).max() < 1e-10 * np.abs(cubic(points)).max()


@pytest.mark.parametrize("old", [3, 5, 7, 27])
@pytest.mark.parametrize("new", [5, 13, 31])
def test_tables_agree_with_scipys_splines(old, new):
    scipy = pytest.importorskip("scipy.interpolate")
    table = torch.randn(old * old, 2, generator=torch.Generator().manual_seed(0))
    got = resize_table(table, new * new, 0)
    at = progression(old, new)
    wanted = np.clip(np.arange(new) - new // 2, at[0], at[-1])
    degree = min(3, old - 1)
    for head in range(2):
        values = table[:, head].view(old, old).double().numpy()
        theirs = scipy.RectBivariateSpline(at, at, values, kx=degree, ky=degree, s=0)(
            wanted, wanted
        )
        assert np.abs(got[:, head].view(new, new).numpy() - theirs).max() < 1e-5


def test_the_middle_and_the_extra_rows_stay():
    table = torch.randn(7 * 7 + 3, 4)
    got = resize_table(table, 11 * 11 + 3, 3)
    assert torch.equal(got[-3:], table[-3:])
    assert torch.allclose(got[11 * 11 // 2], table[7 * 7 // 2], atol=1e-6)


def test_a_smaller_grid_takes_the_near_offsets():
    at = progression(11, 7)
    assert at[5] == 0
    assert (np.diff(at) > 0).all()
    assert at[-1] > 3  # q stays above 1.01: the outer offsets are cut off.


def test_positions_keep_their_prefix_and_constants():
    positions = torch.cat([torch.randn(1, 2, 3), torch.ones(1, 16, 3)], dim=1)
    got = resize_positions(positions, 2, 6)
    assert torch.equal(got[:, :2], positions[:, :2])
    assert torch.allclose(got[:, 2:], torch.ones(1, 36, 3))
    assert resize_positions(positions.half(), 2, 6).dtype == torch.float32


def test_dinos_margin_is_the_published_scale():
    positions = torch.randn(1, 1 + 14 * 14, 4)
    got = resize_positions(positions, 1, 16, margin=0.1)
    grid = positions[:, 1:].view(1, 14, 14, 4).permute(0, 3, 1, 2)
    scale = 16.1 / 14
    theirs = torch.nn.functional.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
    assert torch.equal(got[:, 1:], theirs.permute(0, 2, 3, 1).reshape(1, 256, 4))
    assert not torch.allclose(got, resize_positions(positions, 1, 16), atol=1e-4)


def test_rectangles_are_refused():
    assert square_side(49) == 7
    with pytest.raises(WeightsError, match="got 50"):
        resize_positions(torch.zeros(1, 51, 3), 1, 8)

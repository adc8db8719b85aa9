from __future__ import annotations

import numpy as np
import pytest
import torch

from fd_large.backbones.position_tables import fit_offsets, progression, spline_matrix


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

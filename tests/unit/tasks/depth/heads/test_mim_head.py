"""MIM-Depth's decoder: its size, its kernels, and how much it interpolates."""

from __future__ import annotations

import pytest
import torch

from fd_large.tasks.depth.heads.mim_head import MimHead


@pytest.mark.parametrize(("stride", "side"), [(32, 64), (16, 32), (14, 32), (8, 16)])
def test_a_map_becomes_as_large_as_its_image(stride, side):
    head = MimHead(6, 4, stride, kernels=(4, 3, 2))
    # Where the stride is no power of two, the task resizes what is left.
    assert head(torch.randn(2, 6, 2, 2)).shape == (2, 1, side, side)


def test_it_has_the_published_size_and_begins_in_the_middle():
    head = MimHead(1024, 128, 32)
    # Three transposed convolutions of 2 x 2 and their norms, one convolution and its norm, two.
    deconvolutions = 4 * (1024 * 32 + 2 * 32 * 32) + 3 * 64
    convolutions = (9 * 32 * 128 + 128) + 256 + (9 * 128 * 128 + 128) + (9 * 128 + 1)
    assert sum(p.numel() for p in head.parameters()) == deconvolutions + convolutions
    assert head(torch.randn(1, 1024, 1, 1)).abs().max() < 0.05

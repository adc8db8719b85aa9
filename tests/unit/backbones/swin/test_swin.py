from __future__ import annotations

import pytest
import torch

from fd_large.backbones.swin.swin import Swin
from fd_large.errors import ShapeError


def tiny(**options) -> Swin:
    torch.manual_seed(0)
    options = {"window_size": 4, "patch_size": 2, "image_size": 16} | options
    return Swin(8, (2, 2), (1, 2), **options)


def test_tables_have_the_window_of_their_stage():
    net = tiny(window_size=8, image_size=16)
    tables = [block.attn.relative_position_bias_table.shape for block in net.blocks()]
    assert tables == [(225, 1)] * 2 + [(49, 2)] * 2


def test_merging_norms_four_tokens_first():
    net = tiny()
    assert net.layers[0].downsample.norm.weight.shape == (32,)
    assert net.layers[0].downsample.reduction.weight.shape == (16, 32)
    assert net.layers[1].downsample is None


def test_larger_images_use_the_same_tables():
    net = tiny()
    assert net(torch.randn(1, 3, 32, 16)).grid == net.grid(32, 16) == (8, 4)


def test_smaller_images_are_named():
    with pytest.raises(ShapeError, match=r"2x2 .*4x4"):
        tiny()(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ShapeError, match="stage 0") as caught:
        tiny()(torch.zeros(1, 3, 20, 20))
    assert "--student.size_rule pad" in str(caught.value)

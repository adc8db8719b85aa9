from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from dense_models import swin_of, timm_of, vit_of

from fd_large.tasks.dense.stages import features, pyramid_of, strides_of

NETS = {
    "swin": partial(swin_of, "swinv2_tiny", window_size=4, depths=(1, 1, 1, 1)),
    "vit": vit_of,
    "timm": timm_of,
}


@pytest.mark.parametrize("kind", NETS)
def test_a_pyramid_halves_from_level_to_level(kind):
    net = NETS[kind]()
    pyramid = pyramid_of(net, 8)
    maps = pyramid(features(net, torch.randn(2, 3, 96, 160), None))
    strides = strides_of(net)
    assert strides == (4, 8, 16, 32, 64)
    for level, stride in zip(maps, strides, strict=True):
        assert level.shape == (2, 8, math.ceil(96 / stride), math.ceil(160 / stride))
    sum(level.square().sum() for level in maps).backward()
    for name, parameter in [*net.named_parameters(), *pyramid.named_parameters()]:
        assert parameter.grad is not None, name


def test_norms_of_the_stages_have_their_usual_names():
    names = dict(pyramid_of(swin_of("swinv2_tiny", depths=(1, 1, 1, 1)), 8).named_parameters())
    assert {f"norm{stage}.weight" for stage in range(4)} <= set(names)

from __future__ import annotations

import colorsys

import numpy as np
import pytest

from fd_large.tasks.dense.color import to_hsv, to_rgb


def test_hsv_and_back():
    draw = np.random.default_rng(0)
    image = draw.integers(0, 256, (50, 20, 3)).astype(np.uint8)
    hsv = to_hsv(image)
    for pixel, found in zip(image.reshape(-1, 3), hsv.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*(pixel / 255))
        assert min(abs(found[0] - 180 * hue), 180 - abs(found[0] - 180 * hue)) <= 0.51
        assert found[1] == pytest.approx(255 * saturation, abs=0.51)
        assert found[2] == pytest.approx(255 * value, abs=0.01)
    back = to_rgb(hsv).astype(int)
    assert np.abs(back - image).max() <= 6
    assert np.abs(back - image).mean() < 1.5

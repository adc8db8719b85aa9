from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import ColorJitter
from torchvision.transforms.v2 import functional as F

from fd_large.data.color import NUM_DRAWS, jitter_color
from fd_large.data.random_numbers import uniforms

MIDDLE = 0.5  # of a draw: no change


@pytest.fixture(scope="module")
def image(photograph):
    return torch.from_numpy(photograph(24, 32)).permute(2, 0, 1).contiguous()


def jitter(image, draws, strength=0.4, grayscale_probability=0.0):
    return jitter_color(
        image, draws, strength=strength, grayscale_probability=grayscale_probability
    )


@pytest.mark.parametrize(
    ("number", "operation"),
    [
        (0, lambda x: F.adjust_brightness(x, 1.2)),
        (1, lambda x: F.adjust_contrast(x, 1.2)),
        (2, lambda x: F.adjust_saturation(x, 1.2)),
        (3, lambda x: F.adjust_hue(x, 0.05)),
    ],
)
def test_each_draw_drives_torchvisions_operation(image, number, operation):
    draws = [MIDDLE] * 4 + [0.0, 0.0]
    unchanged = jitter(image, draws)
    draws[number] = 0.75  # half way to the upper end
    difference = (jitter(image, draws).int() - operation(image).int()).abs()
    assert difference.max() <= 2  # hue's way to HSV and back rounds
    assert not torch.equal(jitter(image, draws), unchanged)


def test_the_order_is_drawn(image):
    results = {
        jitter(image, [0.9, 0.1, 0.9, 0.9, order, 0.9]).numpy().tobytes()
        for order in (np.arange(24) + 0.5) / 24
    }
    assert len(results) > 4


def test_the_spread_is_that_of_torchvisions_jitter(image):
    rows = uniforms(0, 0, np.arange(700), "color", NUM_DRAWS).tolist()
    ours = np.array([jitter(image, row).double().mean() for row in rows])
    torch.manual_seed(0)
    theirs_of = ColorJitter(0.4, 0.4, 0.4, 0.1)
    theirs = np.array([theirs_of(image).double().mean() for _ in range(700)])
    assert abs(ours.mean() - theirs.mean()) < 4 * np.hypot(ours.std(), theirs.std()) / 700**0.5
    assert abs(ours.std() / theirs.std() - 1) < 0.1


def test_gray_views_come_with_their_probability(image):
    rows = uniforms(1, 0, np.arange(1000), "color", NUM_DRAWS).tolist()
    views = [jitter(image, row, strength=0.0, grayscale_probability=0.2) for row in rows]
    gray = sum(bool((view == view[:1]).all()) for view in views)
    assert abs(gray - 200) < 4 * (1000 * 0.2 * 0.8) ** 0.5
    assert sum(torch.equal(view, image) for view in views) == 1000 - gray


def test_nothing_is_changed_at_strength_zero(image):
    assert jitter(image, [0.9] * NUM_DRAWS, strength=0.0) is image

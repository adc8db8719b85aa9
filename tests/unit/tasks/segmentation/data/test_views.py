from __future__ import annotations

import numpy as np
import pytest
import torch

from fd_large.data.random_numbers import uniforms
from fd_large.tasks.segmentation.data import photometric
from fd_large.tasks.segmentation.data.views import NUM_DRAWS, TestViews, TrainingViews

COLORS = [0.9] * photometric.NUM_DRAWS  # nothing is changed


def sample(height: int, width: int) -> tuple[torch.Tensor, np.ndarray]:
    """Quarters of four classes, each pixel ten times the number of its class."""
    labels = np.zeros((height, width), np.int16)
    labels[height // 2 :] += 1
    labels[:, width // 2 :] += 2
    return torch.from_numpy(np.repeat(10 * labels[None], 3, 0).astype(np.uint8)), labels


@pytest.mark.parametrize("size", [(60, 90), (91, 47), (20, 20)])
def test_labels_lie_where_their_pixels_lie(size):
    views = TrainingViews(32, (0.5, 2.0), 1.0, False)
    image, labels = sample(*size)
    for draws in uniforms(0, 0, range(20), "jitter", NUM_DRAWS).tolist():
        pixels, seen = views.view(image, labels, (draws, COLORS))
        assert pixels.shape[1:] == seen.shape
        assert max(seen.shape) <= 32
        # Between the quarters, pixels are mixed and labels are not.
        wrong = np.abs(pixels[0].numpy().astype(int) - 10 * seen) > 10
        assert wrong.mean() < 0.2


def test_sizes_are_those_of_the_published_range():
    views = TrainingViews(64, (0.5, 2.0), 1.0, False)
    image, labels = sample(64, 96)
    for draw, height in ((0.0, 32), (1 / 3, 64), (0.999, 64)):
        draws = [draw, 0.9, *[0.0] * (NUM_DRAWS - 2)]
        assert views.view(image, labels, (draws, COLORS))[1].shape[0] == height


def test_a_crop_of_one_class_is_drawn_again():
    views = TrainingViews(16, (4.0, 4.0), 0.75, False)
    image, labels = sample(64, 64)
    corners = [0.0, 0.0] * 3 + [0.5, 0.5] + [0.0, 0.0] * 7
    _, seen = views.view(image, labels, ([0.0, 0.9, *corners], COLORS))
    assert len(np.unique(seen)) == 4
    _, seen = views._replace(cat_max_ratio=1.0).view(image, labels, ([0.0, 0.9, *corners], COLORS))
    assert len(np.unique(seen)) == 1
    # The last crop is taken as it is, and so is one without labels.
    _, seen = views.view(image, labels * 0 - 1, ([0.0, 0.9, *corners], COLORS))
    assert (seen == -1).all()


def test_every_change_keeps_its_range_and_is_made_half_of_the_time():
    grey = np.full((2, 2, 3), 100, np.uint8)
    seen = [
        photometric.distort(grey, draws)[0, 0]
        for draws in uniforms(0, 0, range(400), "color", photometric.NUM_DRAWS).tolist()
    ]
    values = np.array(seen)
    assert (values == values[:, :1]).all()  # Grey has neither saturation nor hue.
    assert values.min() >= int((100 - 32) * 0.5)
    assert values.max() <= (100 + 32) * 1.5
    assert 0.15 < (values[:, 0] == 100).mean() < 0.35
    for changed, least, most in (((0, 1), 68, 132), ((3, 4), 50, 150)):
        for amount in (0.0, 0.999):
            draws = [0.9] * photometric.NUM_DRAWS
            draws[changed[0]], draws[changed[1]], draws[2] = 0.0, amount, 0.0
            value = photometric.distort(grey, draws)[0, 0, 0]
            assert value == pytest.approx(least if amount == 0 else most, abs=1)
    red = np.full((1, 1, 3), (200, 50, 50), np.uint8)
    turned = [0.9] * 7 + [0.0, 0.999]
    assert photometric.distort(red, turned)[0, 0].tolist() == pytest.approx([200, 135, 50], abs=3)


def test_test_sizes():
    whole = TestViews(64, 100, (1.0, 0.5), True)
    assert [view.size for view in whole.views(32, 64)] == [(50, 100), (25, 50)]
    assert whole.num_forwards(32, 64, 1) == 4
    slides = TestViews(64, 100, (1.0, 0.5), False, crop=64, stride=42)
    # The shorter side is at least a window, and nothing limits the longer one.
    assert [view.size for view in slides.views(32, 64)] == [(64, 128), (64, 128)]
    assert slides.num_forwards(32, 64, 2) == 2 * 2

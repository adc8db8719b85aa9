from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch
from depth_images import image_and_depths, write_images

from fd_large.data.random_numbers import uniforms
from fd_large.errors import DataError
from fd_large.tasks.dense.loader import TrainingBatches
from fd_large.tasks.depth.data.dataset import DepthSet, open_depth
from fd_large.tasks.depth.data.views import Drawn, TestViews, TrainingViews, changed_colors

UNCHANGED = (0.9,) * 9


def sample(height: int = 48, width: int = 64) -> tuple[torch.Tensor, np.ndarray]:
    """Each pixel is ten times its depth."""
    depths = 8 * np.add.outer(np.arange(height) / height, np.arange(width) / width)
    depths = depths.astype(np.float32)
    return torch.from_numpy((10 * depths).astype(np.uint8)).expand(3, -1, -1), depths


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (96, 160), (30, 40)])
def test_depths_lie_where_their_pixels_lie(size):
    views = TrainingViews(48, colors=False, cut_depth=0.0)
    image, depths = sample(*size)
    flips = set()
    for drawn in views.draws(0, 0, np.arange(20)):
        pixels, seen = views.view(image, depths, drawn)
        assert pixels.shape[1:] == seen.shape == (48, 48)
        assert np.abs(pixels[0].numpy() - 10 * seen).max() <= 6
        flips.add(bool(seen[0, 0] > seen[0, -1]))
    assert flips == {False, True}


def test_a_strip_shows_the_depth():
    image, depths = sample()
    depths = depths * 1.7
    drawn = Drawn((0.9, 0.0, 0.0), (0.25, 0.5), UNCHANGED)
    first, last = 16, 16 + int(48 * 0.5 * 0.75)
    scaled, _ = TrainingViews(48, colors=False, max_depth=20.0).view(image, depths, drawn)
    wrapped, _ = TrainingViews(48, colors=False, cut_depth_bytes="wrapped").view(
        image, depths, drawn
    )
    for seen in (scaled, wrapped):
        changed = (seen != image[:, :, :48]).any(0).any(0).nonzero().flatten().tolist()
        assert (changed[0], changed[-1]) == (first, last - 1)
    strip = depths[:, first:last]
    expected = np.minimum(strip * (255 / 20), 255).astype(np.uint8)
    assert np.abs(scaled[:, :, first:last].numpy().astype(int) - expected).max() <= 1
    # As published: millimetres that are cast to eight bits.
    millimetres = np.rint(strip * 1000).astype(np.uint16)
    assert np.array_equal(wrapped[0, :, first:last].numpy(), millimetres.astype(np.uint8))


def test_a_quarter_of_the_images_has_a_strip():
    positions = np.arange(400)
    drawn = TrainingViews(48).draws(0, 0, positions)
    assert 70 < sum(one.strip is not None for one in drawn) < 130
    drawn = TrainingViews(48, cut_depth_bytes="wrapped").draws(0, 0, positions)
    assert [place for place, one in enumerate(drawn) if one.strip] == list(range(0, 400, 4))
    for how in ("scaled", "wrapped"):
        views = TrainingViews(48, cut_depth=0.0, cut_depth_bytes=how)
        assert not any(one.strip for one in views.draws(0, 0, positions))


def test_colors_change_as_published():
    image = image_and_depths(0)[0]
    assert np.array_equal(changed_colors(image, UNCHANGED), image)
    # Worked out: contrast 1.1 and brightness .1 of 255, a gamma of 1.12, and shifts of the HSV.
    bright = changed_colors(image, (0.0, 0.75, 0.75, *UNCHANGED[3:]))
    assert np.array_equal(bright, np.clip(image * np.float32(1.1) + 25.5, 0, 255).astype(np.uint8))
    power = changed_colors(image, (*UNCHANGED[:3], 0.0, 0.8, *UNCHANGED[5:]))
    assert np.array_equal(power, (255 * (image / 255) ** 1.12).astype(np.uint8))
    shifted = changed_colors(image, (*UNCHANGED[:5], 0.0, 0.75, 0.25, 1.0))
    for before, after in ((image[50, 2], shifted[50, 2]), (image[30, 40], shifted[30, 40])):
        hue, saturation, value = colorsys.rgb_to_hsv(*(before / 255))
        moved = (hue + 10 / 180) % 1, saturation - 15 / 255, min(value + 20 / 255, 1)
        assert np.abs(255 * np.array(colorsys.hsv_to_rgb(*moved)) - after).max() <= 4


def test_each_change_of_colors_is_made_half_of_the_time():
    image = np.full((1, 1, 3), (120, 90, 60), np.uint8)
    draws = uniforms(0, 0, range(400), "color", 9)
    kept = [np.array_equal(changed_colors(image, tuple(d)), image) for d in draws.tolist()]
    assert 0.07 < np.mean(kept) < 0.2


def test_a_view_follows_from_its_position_alone(tmp_path, monkeypatch):
    images = open_depth(str(write_images(tmp_path, 6)), "train")
    views = TrainingViews(56)
    whole, half = (TrainingBatches(images, views, 3, 1)[np.arange(i, 6)] for i in (0, 3))
    assert torch.equal(whole.images[3:], half.images)
    assert torch.equal(whole.targets.truth[3:], half.targets.truth)
    assert whole.targets.truth.dtype == torch.float32
    other = TrainingBatches(images, views, 3, 2)[np.arange(6)]
    assert not torch.equal(whole.images, other.images)

    def broken(self, index):
        raise DataError("broken")

    monkeypatch.setattr(DepthSet, "sample", broken)
    nothing = TrainingBatches(images, views, 0, 0)[np.arange(2)]
    assert not nothing.targets.truth.any()
    assert len(nothing.bad) == 20


def test_squares_and_their_rest():
    views = TestViews(352, 16, True)
    # KITTI's 1216 x 352 pixels: 57 pixels apart, so that the last nine are in no square.
    squares = views.squares(352, 1216)
    assert [left for _, left, _, _ in squares] == [57 * i for i in range(16)]
    assert views.rest(352, 1216) == [(0, 864, 352, 1216)]
    assert views.num_forwards(352, 1216, 4) == 2 * (4 + 1)
    views = TestViews(480, 2)
    assert views.squares(480, 640) == [(0, 0, 480, 480), (0, 160, 480, 640)]
    assert views.rest(480, 640) == []
    assert views.squares(640, 480) == [(0, 0, 480, 480), (160, 0, 640, 480)]
    # Gaps between the squares of a panorama.
    assert views.rest(480, 1800) == [(0, 480, 480, 960), (0, 960, 480, 1440)]
    assert views.squares(480, 480) == [(0, 0, 480, 480)]
    assert [view.size for view in views.views(960, 1280)] == [(480, 640)]

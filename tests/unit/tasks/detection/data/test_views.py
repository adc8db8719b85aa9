from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fd_large.tasks.detection.data.views import NUM_DRAWS, LargeScaleJitter, ShortestEdge

DRAWS = st.lists(st.floats(0, 1, exclude_max=True), min_size=NUM_DRAWS, max_size=NUM_DRAWS)


@given(
    height=st.integers(8, 300),
    width=st.integers(8, 300),
    draws=DRAWS,
    image_size=st.sampled_from([64, 100]),
)
def test_jitter_scales_within_the_range_keeps_the_aspect_and_fits(height, width, draws, image_size):
    view = LargeScaleJitter(image_size).view(height, width, draws)
    scale = max(view.resized) / image_size
    assert 0.1 - 1 / image_size <= scale <= 2 + 1 / image_size
    ratio = max(view.resized) / max(height, width)
    assert abs(min(view.resized) - max(1, ratio * min(height, width))) <= 1 + ratio
    top, left, rows, columns = view.crop
    assert 0 <= top <= view.resized[0] - rows
    assert 0 <= left <= view.resized[1] - columns
    assert view.size == tuple(min(image_size, side) for side in view.resized)


def test_jitter_draws_sizes_evenly_places_everywhere_and_flips_half():
    draws = np.random.default_rng(0).random((4000, NUM_DRAWS)).tolist()
    views = [LargeScaleJitter(100).view(200, 200, row) for row in draws]
    scales = np.array([view.resized[0] / 100 for view in views])
    counts = np.histogram(scales, bins=19, range=(0.1, 2.0))[0]
    assert counts.min() > 0.7 * 4000 / 19
    assert abs(np.mean([view.flipped for view in views]) - 0.5) < 0.03
    large = [view for view in views if view.resized[0] > 150]
    places = np.array([view.crop[0] / (view.resized[0] - 100) for view in large])
    beside = np.array([view.crop[1] / (view.resized[1] - 100) for view in large])
    assert abs(np.corrcoef(places, beside)[0, 1]) < 0.1
    assert places.min() < 0.02
    assert places.max() == 1
    assert abs(places.mean() - 0.5) < 0.03


def test_shortest_edge_draws_every_length_of_the_range():
    draws = np.random.default_rng(0).random((500, NUM_DRAWS)).tolist()
    views = [ShortestEdge(30, 39, 1000).view(100, 150, row) for row in draws]
    assert {view.size[0] for view in views} == set(range(30, 40))
    assert {view.flipped for view in views} == {True, False}

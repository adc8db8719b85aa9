from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fd_large.errors import ConfigError
from fd_large.tasks.detection.data import masks
from fd_large.tasks.detection.data.objects import ImageObjects
from fd_large.tasks.detection.data.views import (
    NUM_DRAWS,
    LargeScaleJitter,
    ShortestEdge,
    View,
    make_target,
    resized_view,
    whole_view,
)

DRAWS = st.lists(st.floats(0, 1, exclude_max=True), min_size=NUM_DRAWS, max_size=NUM_DRAWS)


def objects(boxes, *, size=(120, 160), segmentations=None, crowds=()) -> ImageObjects:
    """Objects with labels 0, 1, ... that fill their boxes."""
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    if segmentations is None:
        segmentations = [
            [np.array([[a, b], [c, b], [c, d], [a, d]], dtype=np.float64)] for a, b, c, d in boxes
        ]
    return ImageObjects(
        boxes,
        np.arange(len(boxes)),
        segmentations,
        np.array(crowds, dtype=np.float32).reshape(-1, 4),
        17,
        *size,
    )


def as_run_lengths(of: ImageObjects) -> ImageObjects:
    size = (of.height, of.width)
    filled = [masks.from_polygons(polygons, *size) for polygons in of.segmentations]
    packed = [rle["counts"].encode() for rle in masks.encode(np.stack(filled))]
    return of._replace(segmentations=packed)


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
    top, left, box_height, box_width = view.box
    assert 0 <= top <= view.resized[0] - box_height
    assert 0 <= left <= view.resized[1] - box_width
    assert view.size == tuple(min(image_size, side) for side in view.resized)


def test_jitter_draws_sizes_evenly_places_everywhere_and_flips_half():
    draws = np.random.default_rng(0).random((4000, NUM_DRAWS)).tolist()
    views = [LargeScaleJitter(100).view(200, 200, row) for row in draws]
    scales = np.array([view.resized[0] / 100 for view in views])
    counts = np.histogram(scales, bins=19, range=(0.1, 2.0))[0]
    assert counts.min() > 0.7 * 4000 / 19
    assert abs(np.mean([view.flipped for view in views]) - 0.5) < 0.03
    large = [view for view in views if view.resized[0] > 150]
    places = np.array([view.box[0] / (view.resized[0] - 100) for view in large])
    beside = np.array([view.box[1] / (view.resized[1] - 100) for view in large])
    assert abs(np.corrcoef(places, beside)[0, 1]) < 0.1
    assert places.min() < 0.02
    assert places.max() == 1
    assert abs(places.mean() - 0.5) < 0.03


@pytest.mark.parametrize(
    ("size", "short_side", "long_side", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((300, 900), 800, 1333, (444, 1333)),
        ((427, 640), 1024, 1024, (683, 1024)),
        ((1, 900), 800, 1333, (1, 1333)),
    ],
)
def test_resizing_by_the_shortest_edge(size, short_side, long_side, expected):
    view = resized_view(*size, short_side=short_side, long_side=long_side)
    assert view.resized == view.size == expected


def test_shortest_edge_draws_every_length_of_the_range():
    draws = np.random.default_rng(0).random((500, NUM_DRAWS)).tolist()
    views = [ShortestEdge(30, 39, 1000).view(100, 150, row) for row in draws]
    assert {view.size[0] for view in views} == set(range(30, 40))
    assert {view.flipped for view in views} == {True, False}


def test_pixels_boxes_and_masks_move_together():
    picture = torch.zeros(3, 120, 160, dtype=torch.uint8)
    picture[:, 30:60, 40:100] = 255
    seen = objects([[40, 30, 100, 60]])
    draws = np.random.default_rng(1).random((200, NUM_DRAWS)).tolist()
    checked = 0
    for row in draws:
        view = LargeScaleJitter(128, min_scale=0.5).view(120, 160, row)
        image = view.image(picture)
        assert image.dtype == torch.uint8
        assert image.shape == (3, *view.size)
        bright = (image[0] >= 128).numpy()
        for of in (seen, as_run_lengths(seen)):
            target = make_target(of, view, (128, 128))
            if not len(target.boxes):
                assert bright.sum() <= max(bright.shape) * 2
                continue
            mask = target.masks[0].numpy().astype(bool)
            assert not mask[view.size[0] :].any()
            assert not mask[:, view.size[1] :].any()
            mask = mask[: view.size[0], : view.size[1]]
            rows, columns = np.flatnonzero(bright.any(1)), np.flatnonzero(bright.any(0))
            bounds = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(target.boxes[0], bounds, atol=1.01)
            different = (mask != bright).sum()
            assert different <= sum(bright.shape)  # less than a pixel along the edge
            checked += 1
    assert checked > 250


def test_a_cut_object_gets_the_box_of_what_is_left_of_it():
    corner = np.array([[10, 10], [50, 10], [50, 20], [20, 20], [20, 90], [10, 90]], dtype=float)
    of = objects([[10, 10, 50, 90]], segmentations=[[corner]])
    view = View((120, 160), (120, 160), (40, 0, 80, 160), False)
    target = make_target(of, view, (80, 160))
    np.testing.assert_allclose(target.boxes, [[10, 0, 20, 50]], atol=1)
    assert target.boxes[0, 2] < 25  # the box itself would reach to 50
    flipped = make_target(of, View((120, 160), (120, 160), (40, 0, 80, 160), True), (80, 160))
    np.testing.assert_allclose(flipped.boxes, [[140, 0, 150, 50]], atol=1)


def test_what_leaves_the_view_or_becomes_too_small_is_dropped_with_its_label_and_mask():
    of = objects(
        [[0, 0, 10, 10], [50, 50, 90, 90], [100, 50, 103, 90], [120, 60, 150, 110]],
        crowds=[[0, 0, 20, 20], [40, 40, 100, 100]],
    )
    view = View((120, 160), (30, 40), (10, 10, 20, 30), False)  # a quarter, then a cut
    target = make_target(of, view, (32, 32))
    assert target.labels.tolist() == [1, 3]
    np.testing.assert_allclose(
        target.boxes, [[2.5, 2.5, 12.5, 12.5], [20, 5, 27.5, 17.5]], atol=1e-5
    )
    assert target.masks.shape == (2, 32, 32)
    assert target.masks.flatten(1).any(1).all()
    np.testing.assert_allclose(target.crowd_boxes, [[0, 0, 15, 15]])
    assert (target.boxes.dtype, target.labels.dtype) == (torch.float32, torch.int64)
    assert (target.masks.dtype, target.image_id) == (torch.uint8, 17)


def test_a_view_may_show_nothing():
    target = make_target(
        objects([[0, 0, 5, 5]]), View((120, 160), (120, 160), (60, 60, 20, 20), False), (32, 32)
    )
    assert [tuple(part.shape) for part in target[:4]] == [(0, 4), (0,), (0, 32, 32), (0, 4)]


def test_an_object_whose_polygon_lies_beside_its_box_and_the_view_is_dropped():
    view = View((120, 160), (120, 160), (40, 40, 60, 60), False)
    for left, top in ((10, 60), (130, 60), (60, 10), (60, 110)):
        corners = [[left, top], [left + 9, top], [left + 9, top + 9]]
        polygon = np.array(corners, dtype=float)
        target = make_target(objects([[50, 50, 90, 90]], segmentations=[[polygon]]), view, (60, 60))
        assert len(target.boxes) == len(target.masks) == 0


def test_a_set_without_masks_keeps_cut_boxes():
    of = objects([[0, 0, 50, 50], [60, 60, 90, 90]], segmentations=[])
    target = make_target(of, View((120, 160), (120, 160), (20, 20, 60, 60), False), (60, 60))
    np.testing.assert_allclose(target.boxes, [[0, 0, 30, 30], [40, 40, 60, 60]])
    assert target.masks.shape == (2, 0, 0)


def test_polygons_that_leave_the_view_are_filled_as_the_whole_one_is():
    polygon = np.array([[20, 10], [107, 13], [95, 99], [22, 86]], dtype=float)
    whole = make_target(
        objects([[15, 6, 109, 99]], segmentations=[[polygon]]), whole_view(120, 160), (120, 160)
    )
    view = View((120, 160), (120, 160), (30, 40, 40, 40), False)
    part = make_target(objects([[15, 6, 109, 99]], segmentations=[[polygon]]), view, (40, 40))
    assert (part.masks[0] != whole.masks[0, 30:70, 40:80]).sum() <= 8


@pytest.mark.parametrize(
    "make",
    [
        lambda: LargeScaleJitter(0),
        lambda: LargeScaleJitter(64, min_scale=2, max_scale=1),
        lambda: LargeScaleJitter(64, min_scale=0),
        lambda: ShortestEdge(0, 10, 20),
        lambda: ShortestEdge(20, 10, 20),
        lambda: ShortestEdge(20, 30, 10),
    ],
)
def test_sizes_that_are_none_are_refused(make):
    with pytest.raises(ConfigError, match=r"Set for example"):
        make()

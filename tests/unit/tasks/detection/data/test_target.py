from __future__ import annotations

from importlib import util

import numpy as np
import torch

from fd_large.tasks.dense.geometry import View, whole_view
from fd_large.tasks.detection.data import masks, target
from fd_large.tasks.detection.data.objects import ImageObjects
from fd_large.tasks.detection.data.target import make_target
from fd_large.tasks.detection.data.views import NUM_DRAWS, LargeScaleJitter

SIZE = (120, 160)


def crop(top: int, left: int, height: int, width: int, *, flipped: bool = False) -> View:
    return View(SIZE, SIZE, (top, left, height, width), flipped)


def objects(boxes, *, segmentations=None, crowds=()) -> ImageObjects:
    """Objects with labels 0, 1, ... that fill their boxes."""
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    if segmentations is None:
        segmentations = [
            [np.array([[a, b], [c, b], [c, d], [a, d]], dtype=np.float64)] for a, b, c, d in boxes
        ]
    crowds = np.array(crowds, dtype=np.float32).reshape(-1, 4)
    return ImageObjects(boxes, np.arange(len(boxes)), segmentations, crowds, 17, *SIZE)


def as_run_lengths(of: ImageObjects) -> ImageObjects:
    filled = [masks.from_polygons(polygons, *SIZE) for polygons in of.segmentations]
    packed = [rle["counts"].encode() for rle in masks.encode(np.stack(filled))]
    return of._replace(segmentations=packed)


def test_boxes_and_masks_lie_where_the_pixels_of_the_object_are():
    image = torch.zeros(3, *SIZE, dtype=torch.uint8)
    image[:, 30:60, 40:100] = 255
    seen = objects([[40, 30, 100, 60]])
    checked = 0
    for row in np.random.default_rng(1).random((200, NUM_DRAWS)).tolist():
        view = LargeScaleJitter(128, min_scale=0.5).view(*SIZE, row)
        bright = (view.image(image)[0] >= 128).numpy()
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
            # They differ by less than a pixel along the edge.
            assert (mask != bright).sum() <= sum(bright.shape)
            checked += 1
    assert checked > 250


def test_a_cut_object_gets_the_box_of_what_is_left_of_it():
    corner = np.array([[10, 10], [50, 10], [50, 20], [20, 20], [20, 90], [10, 90]], dtype=float)
    of = objects([[10, 10, 50, 90]], segmentations=[[corner]])
    # The box itself would reach to column 50.
    for flipped, box in ((False, [10, 0, 20, 50]), (True, [140, 0, 150, 50])):
        target = make_target(of, crop(40, 0, 80, 160, flipped=flipped), (80, 160))
        np.testing.assert_allclose(target.boxes, [box], atol=1)


def test_what_leaves_the_view_or_becomes_too_small_is_dropped_with_its_label_and_mask():
    of = objects(
        [[0, 0, 10, 10], [50, 50, 90, 90], [100, 50, 103, 90], [120, 60, 150, 110]],
        crowds=[[0, 0, 20, 20], [40, 40, 100, 100]],
    )
    view = View(SIZE, (30, 40), (10, 10, 20, 30), False)  # A quarter, then a crop.
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
    nothing = make_target(objects([[0, 0, 5, 5]]), crop(60, 60, 20, 20), (32, 32))
    assert [tuple(part.shape) for part in nothing[:4]] == [(0, 4), (0,), (0, 32, 32), (0, 4)]


def test_an_object_whose_polygon_lies_beside_its_box_and_the_view_is_dropped():
    for left, top in ((10, 60), (130, 60), (60, 10), (60, 110)):
        corners = [[left, top], [left + 9, top], [left + 9, top + 9]]
        of = objects([[50, 50, 90, 90]], segmentations=[[np.array(corners, dtype=float)]])
        target = make_target(of, crop(40, 40, 60, 60), (60, 60))
        assert len(target.boxes) == len(target.masks) == 0


def test_a_set_without_masks_keeps_cut_boxes():
    of = objects([[0, 0, 50, 50], [60, 60, 90, 90]], segmentations=[])
    target = make_target(of, crop(20, 20, 60, 60), (60, 60))
    np.testing.assert_allclose(target.boxes, [[0, 0, 30, 30], [40, 40, 60, 60]])
    assert target.masks.shape == (2, 0, 0)


def test_polygons_that_leave_the_view_are_filled_as_the_whole_one_is():
    polygon = np.array([[20, 10], [107, 13], [95, 99], [22, 86]], dtype=float)
    of = objects([[15, 6, 109, 99]], segmentations=[[polygon]])
    whole = make_target(of, whole_view(*SIZE), SIZE)
    part = make_target(of, crop(30, 40, 40, 40), (40, 40))
    assert (part.masks[0] != whole.masks[0, 30:70, 40:80]).sum() <= 8


def test_a_first_import_under_the_meta_device_leaves_targets_on_the_host():
    spec = util.spec_from_file_location("imported_on_meta", target.__file__)
    imported = util.module_from_spec(spec)
    with torch.device("meta"):
        spec.loader.exec_module(imported)
    assert imported.NO_SEMANTIC.device.type == "cpu"

from __future__ import annotations

import numpy as np
import pytest
from coco import CATEGORIES, annotation
from matplotlib.colors import to_rgb
from PIL import Image

from fd_large.tasks.detection.data import masks
from fd_large.tasks.detection.scores.annotated_images import (
    COLOURS,
    Mark,
    compared_rows,
    draw_image,
    draw_rows,
    marks_of,
)
from fd_large.tasks.detection.scores.error_analysis import compare

GREY = np.full((90, 120, 3), 128, dtype=np.uint8)


@pytest.fixture
def truth() -> dict:
    images = [
        {"id": 1, "height": 90, "width": 120, "file_name": "one.jpg"},
        {"id": 2, "height": 90, "width": 120, "file_name": "two.jpg"},
    ]
    annotations = [
        annotation(1, 1, [10, 10, 40, 60]),
        annotation(2, 1, [60, 10, 40, 60], category_id=7),
        annotation(3, 2, [10, 10, 40, 60], iscrowd=1, segmentation={"size": [90, 120]}),
    ]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def found(image: int, box, category: int = 3) -> dict:
    mask = np.zeros((1, 90, 120), dtype=np.uint8)
    left, top, width, height = box
    mask[0, top : top + height, left : left + width] = 1
    return {
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "score": 0.75,
        "segmentation": masks.encode(mask)[0],
    }


def mixed(colour: str) -> np.ndarray:
    return 128 + 0.45 * (np.array(to_rgb(colour)) * 255 - 128)


def test_a_picture_shows_masks_boxes_and_keeps_its_size(tmp_path):
    inside = np.zeros((90, 120), dtype=np.uint8)
    inside[40:70, 20:60] = 1
    mark = Mark([20, 40, 40, 30], "cat 0.75", COLOURS[1], inside, False)
    box_alone = Mark([70, 10, 40, 30], "dog", COLOURS[0], None, False)
    draw_image(GREY, [mark, box_alone], tmp_path / "p.png")
    drawn = np.asarray(Image.open(tmp_path / "p.png").convert("RGB")).astype(float)
    assert drawn.shape == (90, 120, 3)
    np.testing.assert_allclose(drawn[65, 50], mixed(COLOURS[1]), atol=3)
    for nothing in (drawn[85, 110], drawn[35, 105]):
        np.testing.assert_allclose(nothing, 128, atol=3)
    edge = drawn[55, 18:23].sum(-1)
    assert edge.min() < 250  # the box's dark border


def test_marks_of_detections_have_a_colour_for_each_class():
    entries = [
        found(1, [10, 10, 40, 60]) | {"class": "dog"},
        {"class": "cat", "bbox": [0, 0, 9, 9], "score": 0.5},
        {"class": "dog", "bbox": [0, 0, 9, 9], "score": 0.25},
    ]
    marks = marks_of(entries)
    assert [mark.label for mark in marks] == ["dog 0.75", "cat 0.50", "dog 0.25"]
    assert [mark.colour for mark in marks] == [COLOURS[1], COLOURS[0], COLOURS[1]]
    assert marks[0].mask.shape == (90, 120)
    assert marks[1].mask is None
    assert not any(mark.wrong for mark in marks)


def test_rows_compare_truth_with_what_was_seen(truth):
    results = [found(1, [10, 10, 40, 60]), found(1, [60, 40, 20, 20], 90)]
    rows = compared_rows(truth, compare(truth, results), [1, 2], lambda number: GREY)
    assert rows[0].title == "one.jpg: 1 of 2 missed, 1 false"
    assert [(mark.label, mark.wrong) for mark in rows[0].truth] == [("cat", False), ("dog", True)]
    assert [(mark.label, mark.wrong) for mark in rows[0].seen] == [
        ("cat 0.75", False),
        ("brush 0.75", True),
    ]
    assert rows[0].truth[0].mask.sum() == rows[0].seen[0].mask.sum() == 40 * 60
    assert rows[0].truth[0].colour == rows[0].seen[0].colour
    assert rows[1].title == "two.jpg: 0 of 0 missed, 0 false"
    assert rows[1].truth == rows[1].seen == []


def test_rows_are_drawn_side_by_side(truth, tmp_path):
    results = [found(1, [10, 10, 40, 60])]
    rows = compared_rows(truth, compare(truth, results), [1, 2], lambda number: GREY)
    draw_rows(rows, tmp_path / "rows.png")
    drawn = np.asarray(Image.open(tmp_path / "rows.png").convert("RGB")).astype(float)
    half = drawn.shape[1] // 2
    for colour, left, right in ((rows[0].truth[0].colour, True, True), (COLOURS[1], True, False)):
        for side, shown in ((drawn[:, :half], left), (drawn[:, half:], right)):
            near = (np.abs(side - mixed(colour)).max(-1) < 4).sum()
            assert (near > 3000) == shown

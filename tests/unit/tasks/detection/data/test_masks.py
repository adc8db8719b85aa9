"""Masks as COCO's own tools count them, and run lengths that are none."""

from __future__ import annotations

import numpy as np
import pytest
from pycocotools import mask as official

from fd_large.tasks.detection.data import masks

MASK = np.random.default_rng(0).integers(0, 2, (7, 5), dtype=np.uint8)


def lengths(mask):
    """Run lengths column by column, zeros first."""
    flat = mask.T.reshape(-1)
    changes = np.flatnonzero(np.diff(flat, prepend=0, append=1 - flat[-1]))
    return [int(n) for n in np.diff([0, *changes])]


def test_polygons_are_filled_to_their_union():
    polygons = [
        np.array([[1.0, 1], [6, 1], [6, 4], [1, 4]]),
        np.array([[5.0, 3], [12, 3], [12, 9]]),
    ]
    found = masks.from_polygons(polygons, 8, 10)
    flat = [polygon.reshape(-1).tolist() for polygon in polygons]
    expected = official.decode(official.merge(official.frPyObjects(flat, 8, 10)))
    assert found.shape == (8, 10)
    assert np.array_equal(found, expected)
    assert found[2, 3] == 1
    assert found[7, 0] == 0


def test_run_lengths_of_either_kind_are_the_mask():
    packed = masks.compress({"size": [7, 5], "counts": lengths(MASK)}, 7, 5)
    assert np.array_equal(masks.decompress(packed, 7, 5), MASK)
    assert masks.compress({"size": [7, 5], "counts": packed.decode()}, 7, 5) == packed
    (result,) = masks.encode(MASK[None])
    assert result == {"size": [7, 5], "counts": packed.decode()}
    assert np.array_equal(official.decode(result), MASK)
    assert masks.encode(np.zeros((0, 7, 5), np.uint8)) == []


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        ({"size": [5, 7], "counts": lengths(MASK)}, r"size \[5, 7\]"),
        ({"size": [7, 5], "counts": [30]}, "30 pixels"),
        ({"size": [7, 5], "counts": [40, -5]}, "invalid run lengths"),
        ({"size": [7, 5], "counts": [17.5, 17.5]}, "invalid run lengths"),
        ({"size": [7, 5], "counts": 35}, "neither"),
        ({"counts": [35]}, "size None"),
    ],
)
def test_what_is_no_mask_of_the_image_is_refused(rle, message):
    with pytest.raises(ValueError, match=message):
        masks.compress(rle, 7, 5)

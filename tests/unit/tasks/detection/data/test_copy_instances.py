from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fd_large.tasks.detection.data import masks
from fd_large.tasks.detection.data.copy_instances import DRAWS_PER_OBJECT, copy_instances
from fd_large.tasks.detection.data.objects import ImageObjects

SIZE = (90, 120)
LOOSE = [[30, 20, 60, 50], [62, 20, 92, 60], [50, 40, 75, 70], [12, 60, 30, 78]]
# Its boxes meet no other, but their copies may; the last one touches the border.
APART = [[30, 20, 60, 50], [61, 20, 91, 50], [30, 51, 60, 75], [95, 60, 120, 80]]


def octagons(boxes, *, as_run_lengths: bool = False) -> ImageObjects:
    """Objects with labels 0, 1, ... that fill their boxes up to the corners."""
    parts = [(0, 0.3), (0.3, 0), (0.7, 0), (1, 0.3), (1, 0.7), (0.7, 1), (0.3, 1), (0, 0.7)]
    polygons = [
        [np.array([[a + x * (c - a), b + y * (d - b)] for x, y in parts])] for a, b, c, d in boxes
    ]
    if as_run_lengths:
        filled = np.stack([masks.from_polygons(polygon, *SIZE) for polygon in polygons])
        polygons = [rle["counts"].encode() for rle in masks.encode(filled)]
    boxes = np.array(boxes, dtype=np.float32).reshape(-1, 4)
    crowds = np.array([[0, 0, 9, 9]], dtype=np.float32)
    return ImageObjects(boxes, np.arange(len(boxes)), polygons, crowds, 1, *SIZE)


def filled(segmentation) -> np.ndarray:
    if isinstance(segmentation, bytes):
        return masks.decompress(segmentation, *SIZE)
    return masks.from_polygons(segmentation, *SIZE)


def noise() -> torch.Tensor:
    return torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)


def plain(image: np.ndarray, objects: ImageObjects, draws: np.ndarray):
    """Group by group, object by object, pixel by pixel: pasted pixels (else -1), masks by label."""
    height, width = SIZE
    groups: list[set[int]] = []
    for number, box in enumerate(objects.boxes):
        joined = {number}
        for group in [g for g in groups if any(meets(box, objects.boxes[m]) for m in g)]:
            joined |= group
            groups.remove(group)
        groups.append(joined)
    pixels, visible = np.full((3, *SIZE), -1.0), {}
    for group in sorted(groups, key=min):
        a, b = objects.boxes[list(group), :2].min(0)
        c, d = objects.boxes[list(group), 2:].max(0)
        draw = draws[min(group)]
        scale, degrees = 0.8 + 0.4 * draw[0], math.floor(3 * draw[1]) - 1
        across, down = (c - a) // 15, (d - b) // 15
        x = math.floor(draw[2] * (2 * across + 1)) - across
        y = math.floor(draw[3] * (2 * down + 1)) - down
        for cut, low, high in (
            (a < 10, (-99, -99), (0, 99)),
            (c > width - 10, (0, -99), (99, 99)),
            (b < 10, (-99, -99), (99, 0)),
            (d > height - 10, (-99, 0), (99, 99)),
        ):
            if cut:
                scale, degrees = max(scale, 1), 0
                x, y = min(max(x, low[0]), high[0]), min(max(y, low[1]), high[1])
        turn = scale * np.exp(1j * math.radians(degrees))
        centre = complex((a + c) / 2, (b + d) / 2)

        def there(p: complex, centre=centre, turn=turn, shift=complex(x, y)) -> complex:
            return (p - centre) * turn + centre + shift

        def back(p: complex, centre=centre, turn=turn, shift=complex(x, y)) -> complex:
            return (p - centre - shift) / turn + centre

        new = {}
        for number in group:
            (polygon,) = objects.segmentations[number]
            moved = [there(complex(*point)) for point in polygon]
            new[number] = masks.from_polygons([np.array([[p.real, p.imag] for p in moved])], *SIZE)
        pasted = np.any(list(new.values()), axis=0)
        for row, column in np.argwhere(pasted):
            pixels[:, row, column] = bilinear(image, back(complex(column + 0.5, row + 0.5)))
        visible = {k: m * ~pasted for k, m in visible.items()} | new
    return pixels, visible


def meets(one, other) -> bool:
    return all(one[i] < other[i + 2] and other[i] < one[i + 2] for i in (0, 1))


def bilinear(image: np.ndarray, point: complex) -> np.ndarray:
    x, y = point.real - 0.5, point.imag - 0.5
    left, top = math.floor(x), math.floor(y)
    total = np.zeros(3)
    for column, across in ((left, left + 1 - x), (left + 1, x - left)):
        for row, down in ((top, top + 1 - y), (top + 1, y - top)):
            inside = min(max(row, 0), SIZE[0] - 1), min(max(column, 0), SIZE[1] - 1)
            total += across * down * image[:, inside[0], inside[1]]
    return total


@pytest.mark.parametrize("boxes", [LOOSE, APART], ids=["in groups", "apart"])
def test_it_is_the_plain_loop(boxes):
    torch.manual_seed(0)
    objects, covered = octagons(boxes), 0
    for draws in np.random.default_rng(0).random((6, len(boxes), DRAWS_PER_OBJECT)):
        image = noise()
        pixels, moved, _ = copy_instances(image, objects, draws)
        expected, visible = plain(image.numpy(), objects, draws)
        pasted = expected[0] >= 0
        np.testing.assert_allclose(pixels.numpy()[:, pasted], expected[:, pasted], atol=0.51)
        assert moved.labels.tolist() == [label for label in range(len(boxes))]
        for label, box, segmentation in zip(
            moved.labels, moved.boxes, moved.segmentations, strict=True
        ):
            mask = filled(segmentation)
            np.testing.assert_array_equal(mask, visible[label])
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            bounds = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
            np.testing.assert_allclose(box, bounds, atol=1)
            covered += isinstance(segmentation, bytes)
        # Besides the old and the new places, nothing changes.
        old = np.any([filled(s) for s in objects.segmentations], axis=0)
        assert torch.equal(pixels[:, ~old & ~pasted], image[:, ~old & ~pasted])
        np.testing.assert_array_equal(moved.crowd_boxes, objects.crowd_boxes)
    assert covered or boxes is LOOSE


@pytest.mark.parametrize("as_run_lengths", [False, True])
def test_pixels_masks_and_classes_follow_and_nothing_stays_behind(as_run_lengths):
    objects = octagons(APART, as_run_lengths=as_run_lengths)
    image, classes = torch.full((3, *SIZE), 200, dtype=torch.uint8), np.full(SIZE, 9, np.int32)
    for label, segmentation in enumerate(objects.segmentations):
        mask = filled(segmentation) > 0
        image[:, mask], classes[mask] = 20 * label, label
    for draws in np.random.default_rng(1).random((6, len(APART), DRAWS_PER_OBJECT)):
        pixels, moved, now = copy_instances(image, objects, draws, classes)
        seen = np.zeros(SIZE, dtype=bool)
        for label, segmentation in zip(moved.labels, moved.segmentations, strict=True):
            mask = filled(segmentation) > 0
            assert not (seen & mask).any()
            seen |= mask
            # All but the edge, which is mixed and rounded.
            assert ((pixels[0].numpy() == 20 * label) & mask).sum() >= 0.8 * mask.sum()
            assert ((now == label) & mask).sum() >= 0.9 * mask.sum()
            assert not ((now == label) & ~mask).any()
        # Flat surroundings close over what was left.
        assert (pixels[0].numpy()[~seen] == 200).all()
        assert set(now[~seen].tolist()) <= {9, 255}


def test_images_without_an_object_pass_through_and_so_do_those_full_of_them():
    image, classes = noise(), np.zeros(SIZE, np.int32)
    whole = octagons([])._replace(
        boxes=np.array([[0, 0, 120, 90]], np.float32),
        labels=np.zeros(1, int),
        segmentations=[[np.array([[0, 0], [120, 0], [120, 90], [0, 90]], float)]],
    )
    for objects in (octagons([]), whole):
        draws = np.full((len(objects.boxes), DRAWS_PER_OBJECT), 0.9)
        found = copy_instances(image, objects, draws, classes)
        assert all(a is b for a, b in zip(found, (image, objects, classes), strict=True))


def test_a_covered_object_is_left_out():
    objects = octagons([[30, 30, 31, 31], [31, 20, 71, 60]])
    # The second grows and moves to the left.
    draws = np.array([[0.5, 0.5, 0.5, 0.5], [0.99, 0.5, 0.0, 0.5]])
    _, moved, _ = copy_instances(noise(), objects, draws)
    assert (moved.labels.tolist(), len(moved.boxes), len(moved.segmentations)) == ([1], 1, 1)


@pytest.mark.parametrize(
    ("half", "box", "polygon"),
    [
        (np.s_[:, :60], [12, 20, 40, 70], [0, 20, 40, 70]),
        (np.s_[:, 60:], [80, 20, 108, 70], [80, 20, 120, 70]),
        (np.s_[:45], [60, 12, 100, 30], [60, 0, 100, 30]),
        (np.s_[45:], [60, 60, 100, 78], [60, 60, 100, 90]),
    ],
    ids=["left", "right", "top", "bottom"],
)
def test_an_object_past_its_box_takes_its_classes_from_its_edge_of_the_image(half, box, polygon):
    """Turned, a pixel of its rim comes from outside of the image by less than a pixel."""
    left, top, right, bottom = polygon
    corners = [[left, top], [right, top], [right, bottom], [left, bottom]]
    objects = octagons([box])._replace(segmentations=[[np.array(corners, dtype=float)]])
    classes = np.full(SIZE, 9, np.int32)
    classes[half] = 1
    for draws in np.random.default_rng(0).random((100, 1, DRAWS_PER_OBJECT)):
        _, moved, now = copy_instances(noise(), objects, draws, classes)
        assert (now[filled(moved.segmentations[0]) > 0] == 1).all()

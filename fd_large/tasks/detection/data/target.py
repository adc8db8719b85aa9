"""The training target of an image: the boxes, classes and masks that are visible in a view.

Targets are NamedTuples, because a batch is pinned and moved to the device by recursion through its
tuples, lists and dicts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large.tasks.dense.geometry import View
from fd_large.tasks.detection.data import masks
from fd_large.tasks.detection.data.objects import ImageObjects

# Smallest height and width, in pixels, of the visible part of an object that becomes a target.
MIN_SIDE = 1.0
# Stride of a semantic map, in pixels, and its value at unlabelled positions.
SEMANTIC_STRIDE, UNLABELLED = 8, 255
# The first import may come while a model is constructed on the meta device.
NO_SEMANTIC = torch.zeros(0, 0, dtype=torch.uint8, device="cpu")


class Target(NamedTuple):
    """The objects of one image, in pixels of the padded image.

    Attributes:
        boxes: (n, 4) float32: left, top, right, bottom.
        labels: (n,) int64, the class of each object, counted from 0.
        masks: (n, H, W) uint8, 0 or 1; (n, 0, 0) if the dataset has no masks.
        crowd_boxes: (m, 4) float32, regions in which single objects are not annotated: left, top,
            right, bottom.
        image_id: The image's id in the dataset.
        semantic: (ceil(h / 8), ceil(w / 8)) uint8 for an image of h x w pixels without padding: the
            class of every eighth pixel, including COCO-Stuff's stuff classes; 255 if unknown.
            (0, 0) if the recipe has no semantic branch.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    crowd_boxes: Tensor
    image_id: int
    semantic: Tensor = NO_SEMANTIC


class Targets(NamedTuple):
    """The targets of a batch.

    Attributes:
        targets: The target of each image.
        sizes: (B, 2) int64, height and width of each image without its padding.
        positions: (B,) int64, the position of each image in the epoch's order, on which the random
            choices for the image depend. As a NumPy array it stays on the host, where random
            numbers are drawn.
        epoch: Epoch, counted from 0.
    """

    targets: list[Target]
    sizes: Tensor
    positions: NDArray[np.int64]
    epoch: int


def make_target(objects: ImageObjects, view: View, canvas: tuple[int, int]) -> Target:
    """Returns the target of a view: the objects that are visible in it.

    If the crop cuts a box, the new box is that of the visible part of the object's mask, which may
    be smaller than the cut box.

    Args:
        objects: The objects of the image, in the image's pixels.
        view: The view of the image.
        canvas: Height and width to which the view is padded, at the right and the bottom; also
            the size of the masks.
    """
    height, width = view.size
    frame = np.array([0, 0, width, height])
    boxes = _boxes_in(view, objects.boxes)
    clipped = _intersection(boxes, frame)
    is_cut = np.abs(boxes - clipped).max(1, initial=0) > 1e-3
    numbers, filled = [], []
    for number in np.flatnonzero(_large_enough(clipped)):
        if objects.segmentations:
            mask, corner = fill(objects.segmentations[number], view)
            if not mask.any():
                continue
            if is_cut[number]:
                left = bounds(mask) + np.tile(corner, 2)
                clipped[number] = _intersection(left, clipped[number])
                if not _large_enough(clipped[number]):
                    continue
            filled.append((mask, corner))
        numbers.append(number)
    area = canvas if objects.segmentations else (0, 0)
    pixels = torch.zeros((len(numbers), *area), dtype=torch.uint8)
    for place, (mask, (left, top)) in enumerate(filled):
        rows, columns = mask.shape
        pixels[place, top : top + rows, left : left + columns] = torch.from_numpy(mask)
    crowds = _intersection(_boxes_in(view, objects.crowd_boxes), frame)
    return Target(
        boxes=torch.from_numpy(clipped[numbers].astype(np.float32)),
        labels=torch.from_numpy(objects.labels[numbers]),
        masks=pixels,
        crowd_boxes=torch.from_numpy(crowds[_large_enough(crowds)].astype(np.float32)),
        image_id=objects.image_id,
    )


def nothing(image_id: int) -> Target:
    """Returns a target without objects and semantic map, for the image with the id `image_id`."""
    return Target(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, 0, 0, dtype=torch.uint8),
        crowd_boxes=torch.zeros(0, 4),
        image_id=image_id,
    )


def _boxes_in(view: View, boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Maps boxes from pixels of the image to pixels of the view; a box may lie outside the view.

    Args:
        view: The view of the image.
        boxes: (n, 4): left, top, right, bottom.
    """
    corners = view.points(boxes.reshape(-1, 2)).reshape(-1, 4)
    return corners[:, [2, 1, 0, 3]] if view.flipped else corners


def _intersection(boxes: NDArray[np.floating], frame: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.clip(boxes, np.tile(frame[:2], 2), np.tile(frame[2:], 2))


def _large_enough(boxes: NDArray[np.floating]) -> NDArray[np.bool_]:
    return ((boxes[..., 2:] - boxes[..., :2]) >= MIN_SIDE).all(-1)


def bounds(mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Returns the box around the ones of a mask, (4,) float64: left, top, right, bottom in pixels.

    Args:
        mask: (H, W), 0 or 1; at least one pixel must be 1.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)


def fill(
    segmentation: list[NDArray[np.float64]] | bytes, view: View
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns the mask of an object in a view, cut out as a window with its position.

    Args:
        segmentation: Polygons of the object, or compressed run lengths, in the image's pixels.
        view: The view of the image.

    Returns: the mask (h, w), 0 or 1, in a window of the view; left and top of the window, (2,). For
        polygons, the window is a rectangle around them. For run lengths, it is the whole view.
    """
    height, width = view.size
    if isinstance(segmentation, bytes):
        return view.mask(masks.decompress(segmentation, *view.original)), np.zeros(2, dtype=int)
    polygons = [view.points(polygon) for polygon in segmentation]
    points = np.concatenate(polygons)
    # One pixel more on either side, since filling rounds to fifths of a pixel.
    low = np.clip(np.floor(points.min(0)) - 1, 0, (width, height)).astype(int)
    high = np.clip(np.ceil(points.max(0)) + 1, 0, (width, height)).astype(int)
    columns, rows = (high - low).tolist()
    if not rows or not columns:
        return np.zeros((rows, columns), dtype=np.uint8), low
    # Rounded, so that the difference falls on the same side of a fifth as the number itself.
    moved = [np.round(polygon - low, 6) for polygon in polygons]
    return masks.from_polygons(moved, rows, columns), low

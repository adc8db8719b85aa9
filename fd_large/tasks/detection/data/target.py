"""The target of an image: the boxes, classes and masks visible in a view.

Targets are NamedTuples, because a batch is moved to the device and pinned by walking through
tuples.
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

# An object of which less than a pixel is left is no target.
MIN_SIDE = 1.0
# Pixels per place of a semantic map, and its value where nothing is labelled.
SEMANTIC_STRIDE, UNLABELLED = 8, 255
# The first import may come while a model is constructed on the meta device.
NO_SEMANTIC = torch.zeros(0, 0, dtype=torch.uint8, device="cpu")


class Target(NamedTuple):
    """The objects of one image, in pixels of the padded image.

    Attributes:
        boxes: (n, 4) float32, left, top, right, bottom.
        labels: (n,) int64, 0 to K - 1.
        masks: (n, H, W) uint8, 0 or 1; (n, 0, 0) if the dataset has only boxes.
        crowd_boxes: (m, 4) float32, regions in which single objects are not marked.
        image_id: The dataset's number of the image.
        semantic: (H / 8, W / 8) uint8, the class of every eighth pixel, stuff included, 255 if
            unknown; (0, 0) if such maps are not read.
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
        targets: One per image, in the order of the images.
        sizes: (B, 2) int64, height and width of each image without its padding.
        positions: (B,) int64, in the epoch's order; random choices for a sample depend on them. A
            NumPy array stays on the host, where the choices are drawn.
        epoch: Counted from 0.
    """

    targets: list[Target]
    sizes: Tensor
    positions: NDArray[np.int64]
    epoch: int


def make_target(objects: ImageObjects, view: View, canvas: tuple[int, int]) -> Target:
    """Returns the objects that are visible in a view, with masks on the padded canvas.

    A box cut by the crop shrinks to the visible part of its object's mask, which may fill only a
    corner of the cut box.

    Args:
        objects: The objects of the image, in its own pixels.
        view: The view of the image.
        canvas: Height and width to which the view is padded, at the right and the bottom.
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
    """Returns the target of an image without objects."""
    return Target(
        boxes=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        masks=torch.zeros(0, 0, 0, dtype=torch.uint8),
        crowd_boxes=torch.zeros(0, 4),
        image_id=image_id,
    )


def _boxes_in(view: View, boxes: NDArray[np.floating]) -> NDArray[np.float64]:
    """Returns boxes (n, 4) of an image in pixels of the view; they may lie outside of it."""
    corners = view.points(boxes.reshape(-1, 2)).reshape(-1, 4)
    return corners[:, [2, 1, 0, 3]] if view.flipped else corners


def _intersection(boxes: NDArray[np.floating], frame: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.clip(boxes, np.tile(frame[:2], 2), np.tile(frame[2:], 2))


def _large_enough(boxes: NDArray[np.floating]) -> NDArray[np.bool_]:
    return ((boxes[..., 2:] - boxes[..., :2]) >= MIN_SIDE).all(-1)


def bounds(mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Returns the box (4,) around the pixels of a mask that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)


def fill(
    segmentation: list[NDArray[np.float64]] | bytes, view: View
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Returns the mask of an object in a window around it, and the window's left and top.

    Args:
        segmentation: Polygons of the object, or compressed run lengths, whose window is the whole
            view.
        view: The view of the image.
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

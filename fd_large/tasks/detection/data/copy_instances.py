"""Cuts out the objects of a training image and pastes them slightly scaled, rotated and shifted.

The method is the random jitter of InstaBoost (Fang et al., ICCV 2019, arXiv 1908.07801). Ranges,
the common transform of objects with overlapping boxes, and the exceptions near the border of an
image follow InstaBoost's code (instaboost/single_image_process.py). InstaBoost's probability map of
locations and its colour jitter are left out. Objects are cut along their masks, without alpha
matting. Uncovered pixels are filled with averages of the surrounding pixels, not by OpenCV's
inpainting.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fd_large.tasks.dense.geometry import whole_view
from fd_large.tasks.detection.data import masks
from fd_large.tasks.detection.data.objects import ImageObjects
from fd_large.tasks.detection.data.target import UNLABELLED, bounds, fill

DRAWS_PER_OBJECT = 4  # scale, angle, and the shift in either direction
SCALES = (0.8, 1.2)
# The largest angle, in whole degrees, and the largest shift, as a part of the box.
DEGREES, SHIFT_PART = 1, 15
# An object closer to the border may be cut by it, and so neither shrinks, turns nor moves away.
BORDER_PIXELS = 10


def copy_instances(
    image: Tensor,
    objects: ImageObjects,
    draws: NDArray[np.float64],
    classes: NDArray[np.int32] | None = None,
) -> tuple[Tensor, ImageObjects, NDArray[np.int32] | None]:
    """Moves all objects of an image except crowds by small random transforms.

    Objects whose boxes overlap move together, as a group, and do not cover each other. A later
    group covers earlier groups. A partly covered object keeps the mask and the box of its visible
    part, and a fully covered object is left out. An image without objects, or without background,
    stays unchanged.

    Args:
        image: (3, H, W) uint8.
        objects: The image's n objects, with segmentations.
        draws: (n, `DRAWS_PER_OBJECT`) uniform random numbers in [0, 1).
        classes: (H, W), the class of each pixel for a semantic branch, or None. A pixel that an
            object uncovers becomes unlabelled (255).

    Returns: the new image; the objects that are still visible in the new image; the new classes,
        or None if `classes` is None.
    """
    view = whole_view(objects.height, objects.width)
    before = np.zeros(view.size, dtype=bool)
    filled = [fill(segmentation, view) for segmentation in objects.segmentations]
    for mask, corner in filled:
        before[_window(mask, corner)] |= mask > 0
    if not filled or before.all():
        return image, objects, classes
    groups = _groups(objects.boxes)
    moves = _moves(objects.boxes, groups, view.size, draws)
    moved = []
    # The group whose objects are seen at each pixel; -1 where none is.
    visible_groups = np.full(view.size, -1, dtype=np.int64)
    # Group by group, as objects that move together do not cover each other.
    for number in np.argsort(groups, kind="stable"):
        group, segmentation = groups[number], objects.segmentations[number]
        if isinstance(segmentation, bytes):
            mask, corner = _moved_mask(
                *filled[number], objects.boxes[number], moves[group], view.size
            )
        else:
            segmentation = [_apply(moves[group], polygon) for polygon in segmentation]
            mask, corner = fill(segmentation, view)
        visible_groups[_window(mask, corner)][mask > 0] = group
        moved.append((number, segmentation, mask, corner))
    numbers, segmentations, boxes = [], [], []
    for number, segmentation, mask, corner in moved:
        visible = mask * (visible_groups[_window(mask, corner)] == groups[number]).astype(np.uint8)
        if not visible.any():
            continue
        box = bounds(visible) + np.tile(corner, 2)
        if isinstance(segmentation, bytes) or (visible < mask).any():
            whole = np.zeros(view.size, dtype=np.uint8)
            whole[_window(visible, corner)] = visible
            segmentation = masks.encode(whole[None])[0]["counts"].encode()
        else:
            points = np.concatenate(segmentation)
            exact = np.concatenate([points.min(0), points.max(0)])
            if (exact[:2] >= 0).all() and (exact[2:] <= view.size[::-1]).all():
                box = exact
        numbers.append(number)
        segmentations.append(segmentation)
        boxes.append(box)
    rows, columns = np.nonzero(visible_groups >= 0)
    places = np.stack([columns, rows], axis=1) + 0.5
    sources = _apply(np.linalg.inv(moves)[visible_groups[rows, columns]], places)
    pixels = _filled_in(image, before) if (before & (visible_groups < 0)).any() else image.clone()
    pixels[:, rows, columns] = _sampled(image, sources)
    if classes is not None:
        nearest = np.clip(np.floor(sources).astype(int), 0, np.array(view.size[::-1]) - 1)
        now = np.where(before, UNLABELLED, classes).astype(classes.dtype)
        now[rows, columns] = classes[nearest[:, 1], nearest[:, 0]]
        classes = now
    order = np.argsort(numbers)
    return (
        pixels,
        objects._replace(
            boxes=np.array(boxes, dtype=np.float32).reshape(-1, 4)[order],
            labels=objects.labels[np.array(numbers, dtype=int)[order]],
            segmentations=[segmentations[place] for place in order],
        ),
        classes,
    )


def _window(mask: NDArray[np.uint8], corner: NDArray[np.int64]) -> tuple[slice, slice]:
    (left, top), (rows, columns) = corner.tolist(), mask.shape
    return slice(top, top + rows), slice(left, left + columns)


def _groups(boxes: NDArray[np.floating]) -> NDArray[np.int64]:
    """Groups objects whose boxes overlap, directly or through other objects.

    Args:
        boxes: (n, 4), the objects' boxes: left, top, right, bottom.

    Returns: (n,), for each object the lowest index of an object in its group.
    """
    overlap = (
        (boxes[:, None, :2] < boxes[None, :, 2:]) & (boxes[None, :, :2] < boxes[:, None, 2:])
    ).all(-1)
    groups = np.arange(len(boxes))
    while True:
        lowest = np.where(overlap, groups, len(boxes)).min(1)
        if (lowest == groups).all():
            return groups
        groups = lowest


def _moves(
    boxes: NDArray[np.floating],
    groups: NDArray[np.int64],
    size: tuple[int, int],
    draws: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Returns random affine transforms in homogeneous coordinates, (n, 3, 3).

    The transform of a group is the entry at the group's index; other entries are not used.

    Args:
        boxes: (n, 4), the objects' boxes: left, top, right, bottom.
        groups: (n,), the result of `_groups`.
        size: Height and width of the image.
        draws: (n, `DRAWS_PER_OBJECT`) uniform random numbers in [0, 1).
    """
    around = boxes.astype(np.float64)
    np.minimum.at(around[:, :2], groups, boxes[:, :2])
    np.maximum.at(around[:, 2:], groups, boxes[:, 2:])
    low, high = around[:, :2], around[:, 2:]
    (smallest, largest), most = SCALES, (high - low) // SHIFT_PART
    scale = smallest + (largest - smallest) * draws[:, 0]
    angle = np.deg2rad(np.floor(draws[:, 1] * (2 * DEGREES + 1)) - DEGREES)
    shift = np.floor(draws[:, 2:] * (2 * most + 1)) - most
    at_low, at_high = low < BORDER_PIXELS, high > np.array(size[::-1]) - BORDER_PIXELS
    is_cut = (at_low | at_high).any(1)
    scale, angle = np.where(is_cut, np.maximum(scale, 1), scale), np.where(is_cut, 0, angle)
    shift = np.where(at_low, np.minimum(shift, 0), shift)
    shift = np.where(at_high, np.maximum(shift, 0), shift)
    moves = np.tile(np.eye(3), (len(boxes), 1, 1))
    cosine, sine = scale * np.cos(angle), scale * np.sin(angle)
    moves[:, 0, 0], moves[:, 0, 1], moves[:, 1, 0], moves[:, 1, 1] = cosine, -sine, sine, cosine
    centre = (low + high) / 2
    moves[:, :2, 2] = centre + shift - (moves[:, :2, :2] @ centre[..., None])[..., 0]
    return moves


def _apply(move: NDArray[np.float64], points: NDArray[np.floating]) -> NDArray[np.float64]:
    """Applies affine transforms to points; returns the new points, (n, 2).

    Args:
        move: A transform (3, 3) for all points, or transforms (n, 3, 3), one for each point.
        points: (n, 2), x and y in pixels.
    """
    return (move[..., :2, :2] @ points[..., None])[..., 0] + move[..., :2, 2]


def _moved_mask(
    mask: NDArray[np.uint8],
    corner: NDArray[np.int64],
    box: NDArray[np.floating],
    move: NDArray[np.float64],
    size: tuple[int, int],
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Transforms an object's mask by nearest-neighbour sampling.

    Args:
        mask: (h, w), the mask in a window of the image.
        corner: Left and top of the window.
        box: The object's box: left, top, right, bottom.
        move: (3, 3), the transform, in pixels of the image.
        size: Height and width of the image.

    Returns: the transformed mask, (h', w'), in a new window around the mask; left and top of the
        new window.
    """
    left, top, right, bottom = box
    corners = _apply(move, np.array([[left, top], [right, top], [right, bottom], [left, bottom]]))
    low = np.clip(np.floor(corners.min(0)) - 1, 0, size[::-1]).astype(int)
    high = np.clip(np.ceil(corners.max(0)) + 1, 0, size[::-1]).astype(int)
    columns, rows = np.meshgrid(np.arange(low[0], high[0]), np.arange(low[1], high[1]))
    places = np.stack([columns, rows], axis=-1).reshape(-1, 2) + 0.5
    x, y = (np.floor(_apply(np.linalg.inv(move), places)).astype(int) - corner).T
    inside = (x >= 0) & (y >= 0) & (x < mask.shape[1]) & (y < mask.shape[0])
    moved = np.zeros(len(places), dtype=np.uint8)
    moved[inside] = mask[y[inside], x[inside]]
    return moved.reshape(rows.shape), low


def _sampled(image: Tensor, points: NDArray[np.float64]) -> Tensor:
    """Returns the bilinearly interpolated colours at points of an image, (3, n) uint8.

    Args:
        image: (3, H, W) uint8.
        points: (n, 2), x and y in pixels.
    """
    grid = points / np.array(image.shape[:0:-1]) * 2 - 1
    colours = F.grid_sample(
        image[None].float(),
        torch.from_numpy(grid).float()[None, None],
        padding_mode="border",
        align_corners=False,
    )
    return colours[0, :, 0].round().to(torch.uint8)


def _filled_in(image: Tensor, hole: NDArray[np.bool_]) -> Tensor:
    """Returns a copy of an image in which a hole has colours interpolated from the other pixels.

    Args:
        image: (3, H, W) uint8.
        hole: (H, W) bool, True for the pixels to replace; at least one pixel must be False.

    Source: Gortler et al., "The lumigraph", SIGGRAPH 1996 (pull-push).
    """
    known = torch.from_numpy(~hole).float()[None, None]
    colours = _pull_push(image[None].float() * known, known)
    return colours[0].round().clamp(0, 255).to(torch.uint8)


def _pull_push(colours: Tensor, known: Tensor) -> Tensor:
    """Returns colours in which unknown pixels are interpolated from coarser resolutions.

    Args:
        colours: (1, 3, H, W) float32, multiplied by `known`.
        known: (1, 1, H, W) float32, the share of each pixel that is known, 0 to 1.

    Returns: (1, 3, H, W) float32.
    """
    if known.shape[-1] * known.shape[-2] == 1:
        return colours / known
    halves = [F.avg_pool2d(values, 2, ceil_mode=True) for values in (colours, known)]
    coarse = F.interpolate(
        _pull_push(*halves), known.shape[-2:], mode="bilinear", align_corners=False
    )
    return colours + (1 - known) * coarse

"""One view of an image and its objects: resized, cropped, flipped, all by the same geometry.

Every number that is drawn comes from the caller, so that a view is a function of (seed, epoch,
position). Pixels stay uint8; masks are filled last, and only of the objects that stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from fd_large.errors import ConfigError
from fd_large.tasks.detection.data import masks
from fd_large.tasks.detection.data.objects import ImageObjects
from fd_large.tasks.detection.heads.target import Target

NUM_DRAWS = 4  # flip, scale, top, left
FLIP_PROBABILITY = 0.5
# Of an object of which less than a pixel is left nothing can be learnt.
MIN_SIDE = 1.0


@dataclass(frozen=True)
class View:
    """An image is resized to `resized`, of that the box is cut out, and that is flipped.

    Attributes:
        image: Height and width that it begins with.
        resized: Height and width after resizing.
        box: Top, left, height, width of what is cut out, inside `resized`.
        flipped: Whether left and right are exchanged at the end.
    """

    picture: tuple[int, int]
    resized: tuple[int, int]
    box: tuple[int, int, int, int]
    flipped: bool

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the view."""
        return self.box[2:]

    def image(self, image: torch.Tensor) -> torch.Tensor:
        """Pixels (3, H, W) uint8 to the view's, by bilinear resizing with antialiasing."""
        if self.resized != self.picture:
            image = F.interpolate(image[None], self.resized, mode="bilinear", antialias=True)[0]
        return self._cut(image)

    def points(self, points: NDArray[np.floating]) -> NDArray[np.float64]:
        """Points (n, 2), x and y in the image, to the view, where they may lie outside."""
        (height, width), (new_height, new_width) = self.picture, self.resized
        top, left, _, box_width = self.box
        moved = points * (new_width / width, new_height / height) - (left, top)
        if self.flipped:
            moved[:, 0] = box_width - moved[:, 0]
        return moved

    def boxes(self, boxes: NDArray[np.floating]) -> NDArray[np.float64]:
        """Boxes (n, 4), left, top, right, bottom, to the view, where they may lie outside."""
        corners = self.points(boxes.reshape(-1, 2)).reshape(-1, 4)
        return corners[:, [2, 1, 0, 3]] if self.flipped else corners

    def mask(self, mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A mask (H, W), 0 or 1, to the view's: a pixel is set that the object covers by half."""
        pixels = torch.from_numpy(np.ascontiguousarray(mask))
        if self.resized != self.picture:
            covered = F.interpolate(
                pixels[None, None].float(), self.resized, mode="bilinear", antialias=True
            )
            pixels = (covered[0, 0] >= 0.5).to(torch.uint8)
        return self._cut(pixels).numpy()

    def _cut(self, image: torch.Tensor) -> torch.Tensor:
        top, left, height, width = self.box
        cut = image[..., top : top + height, left : left + width]
        return (cut.flip(-1) if self.flipped else cut).contiguous()


class Jitter(Protocol):
    """How views of training images are drawn.

    Attributes:
        canvas: Height and width to which all views are padded; None: each keeps its own.
    """

    canvas: tuple[int, int] | None

    def view(self, height: int, width: int, draws: Sequence[float]) -> View:
        """The view of an image, of `NUM_DRAWS` numbers in [0, 1)."""


class LargeScaleJitter:
    """Any size from a tenth to twice, then a crop of fixed size, padded where it is smaller.

    Source: Ghiasi et al., "Simple copy-paste", CVPR 2021; as in detectron2 (ResizeScale,
        FixedSizeCrop): scale and place uniform, the aspect kept.
    """

    def __init__(self, image_size: int, *, min_scale: float = 0.1, max_scale: float = 2.0) -> None:
        """Sets the range.

        Args:
            image_size: Side of the views, in pixels; at scale 1 an image just fits into it.
            min_scale: Smallest scale.
            max_scale: Largest scale.

        Raises: ConfigError: for a size or a range that is none.
        """
        if image_size < 1 or not 0 < min_scale <= max_scale:
            raise ConfigError(
                "detection: no large-scale jitter; got "
                f"image_size {image_size}, scales {min_scale} to {max_scale}, expected a size of 1 "
                "or more and rising scales above 0. Set for example 1024, 0.1 and 2.0."
            )
        self.canvas = (image_size, image_size)
        self._scales = (min_scale, max_scale)

    def view(self, height: int, width: int, draws: Sequence[float]) -> View:
        """The view of an image, of `NUM_DRAWS` numbers in [0, 1)."""
        draw_flip, draw_scale, draw_top, draw_left = draws
        low, high = self._scales
        side = self.canvas[0]
        ratio = side * (low + (high - low) * draw_scale) / max(height, width)
        resized = _scaled(height, width, ratio)
        box_height, box_width = min(side, resized[0]), min(side, resized[1])
        top = int(draw_top * (resized[0] - box_height + 1))
        left = int(draw_left * (resized[1] - box_width + 1))
        return View(
            (height, width),
            resized,
            (top, left, box_height, box_width),
            draw_flip < FLIP_PROBABILITY,
        )


class ShortestEdge:
    """The shorter side to a size from a range, the longer one to at most another; a flip.

    Source: detectron2 (ResizeShortestEdge), with whole numbers from the range.
    """

    canvas = None

    def __init__(self, min_short_side: int, max_short_side: int, long_side: int) -> None:
        """Sets the range.

        Args:
            min_short_side: Smallest length of the shorter side, in pixels.
            max_short_side: Largest length of the shorter side.
            long_side: Most that the longer side may become; the shorter one then becomes smaller.

        Raises: ConfigError: for sizes that are none.
        """
        if not 0 < min_short_side <= max_short_side or long_side < min_short_side:
            raise ConfigError(
                f"detection: no range of sizes; got short sides {min_short_side} to "
                f"{max_short_side} and a long side of at most {long_side}, expected 0 < smallest "
                "<= largest, and a long side not below. Set for example 480, 800 and 1333."
            )
        self._short_sides, self._long_side = (min_short_side, max_short_side), long_side

    def view(self, height: int, width: int, draws: Sequence[float]) -> View:
        """The view of an image, of `NUM_DRAWS` numbers in [0, 1)."""
        draw_flip, draw_size, *_ = draws
        low, high = self._short_sides
        short_side = low + int(draw_size * (high - low + 1))
        return resized_view(
            height,
            width,
            short_side=short_side,
            long_side=self._long_side,
            flipped=draw_flip < FLIP_PROBABILITY,
        )


def whole_view(height: int, width: int) -> View:
    """The image as it is."""
    return View((height, width), (height, width), (0, 0, height, width), False)


def resized_view(
    height: int, width: int, *, short_side: int, long_side: int, flipped: bool = False
) -> View:
    """The whole image at another size: the only change that evaluation makes.

    Args:
        height: Of the image.
        width: Of the image.
        short_side: Length of the shorter side, in pixels.
        long_side: Most that the longer side may become; the shorter one then becomes smaller.
        flipped: Whether left and right are exchanged.
    """
    ratio = min(short_side / min(height, width), long_side / max(height, width))
    resized = _scaled(height, width, ratio)
    return View((height, width), resized, (0, 0, *resized), flipped)


def _scaled(height: int, width: int, ratio: float) -> tuple[int, int]:
    return max(1, round(height * ratio)), max(1, round(width * ratio))


def make_target(objects: ImageObjects, view: View, canvas: tuple[int, int]) -> Target:
    """The objects that a view shows.

    A box that the crop cuts becomes that of what is left of the mask: the part of an object that
    remains may fill but a corner of its cut box.

    Args:
        objects: Of the image, in its pixels.
        view: Of the image.
        canvas: Height and width to which the view is padded, right and bottom.

    Returns: boxes in the view; masks (n, *canvas), or (n, 0, 0) where the set has none.
    """
    height, width = view.size
    frame = np.array([0, 0, width, height])
    boxes = view.boxes(objects.boxes)
    clipped = _intersection(boxes, frame)
    is_cut = np.abs(boxes - clipped).max(1, initial=0) > 1e-3
    kept, filled = [], []
    for number in np.flatnonzero(_large_enough(clipped)):
        if objects.segmentations:
            mask, corner = _fill(objects.segmentations[number], view)
            if not mask.any():
                continue
            if is_cut[number]:
                bounds = _bounds(mask) + np.tile(corner, 2)
                clipped[number] = _intersection(bounds, clipped[number])
                if not _large_enough(clipped[number]):
                    continue
            filled.append((mask, corner))
        kept.append(number)
    area = canvas if objects.segmentations else (0, 0)
    pixels = torch.zeros((len(kept), *area), dtype=torch.uint8)
    for place, (mask, (left, top)) in enumerate(filled):
        rows, columns = mask.shape
        pixels[place, top : top + rows, left : left + columns] = torch.from_numpy(mask)
    crowds = _intersection(view.boxes(objects.crowd_boxes), frame)
    return Target(
        boxes=torch.from_numpy(clipped[kept].astype(np.float32)),
        labels=torch.from_numpy(objects.labels[kept]),
        masks=pixels,
        crowd_boxes=torch.from_numpy(crowds[_large_enough(crowds)].astype(np.float32)),
        image_id=objects.image_id,
    )


def _intersection(boxes: NDArray[np.floating], frame: NDArray[np.floating]) -> NDArray[np.float64]:
    corners = np.concatenate([frame[:2], frame[:2]]), np.concatenate([frame[2:], frame[2:]])
    return np.clip(boxes, *corners)


def _large_enough(boxes: NDArray[np.floating]) -> NDArray[np.bool_]:
    return ((boxes[..., 2:] - boxes[..., :2]) >= MIN_SIDE).all(-1)


def _bounds(mask: NDArray[np.uint8]) -> NDArray[np.float64]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)


def _fill(
    segmentation: list[NDArray[np.float64]] | bytes, view: View
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The mask in the smallest window around it, and the window's left and top."""
    height, width = view.size
    if isinstance(segmentation, bytes):
        return view.mask(masks.decompress(segmentation, *view.picture)), np.zeros(2, dtype=int)
    polygons = [view.points(polygon) for polygon in segmentation]
    points = np.concatenate(polygons)
    # A pixel more on either side: filling rounds to fifths of a pixel.
    low = np.clip(np.floor(points.min(0)) - 1, 0, (width, height)).astype(int)
    high = np.clip(np.ceil(points.max(0)) + 1, 0, (width, height)).astype(int)
    columns, rows = (high - low).tolist()
    if not rows or not columns:
        return np.zeros((rows, columns), dtype=np.uint8), low
    # Rounded, so that the difference falls on the same side of a fifth as the number itself.
    moved = [np.round(polygon - low, 6) for polygon in polygons]
    return masks.from_polygons(moved, rows, columns), low

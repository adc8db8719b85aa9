"""Reads COCO's annotation JSON into flat arrays, which loading processes share without copies.

Unusable annotations are left out, counted and named. Boxes that extend beyond their image are
clipped, and counted if they do so by more than `OUTSIDE_PIXELS`. Torch is not imported.
"""

from __future__ import annotations

import hashlib
import math
import os
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fd_large import files
from fd_large.data.listing import Made
from fd_large.errors import DataError
from fd_large.tasks.detection.data import masks

# Boxes beyond their image by at most this are not counted, as COCO rounds boxes to two decimals.
OUTSIDE_PIXELS = 1.0
NUM_NAMED = 5
MOST_BYTES = 16 << 30
"""Largest size in bytes of an annotation file; the file of Objects365 has 6 GB."""
_MOST_PIXELS = 1 << 31


@dataclass
class Findings:
    """The objects and images that were left out or clipped, by the kind of defect.

    Attributes:
        counts: {kind of defect: number of objects or images with this defect}.
        names: {kind of defect: ids or file names of the first `NUM_NAMED` objects or images with
            this defect}.
    """

    counts: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    names: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, name: object) -> None:
        """Counts an object or image with a defect, and keeps the first `NUM_NAMED` names.

        Args:
            kind: Kind of the defect, as words for a message.
            name: Id or file name of the object or image.
        """
        self.counts[kind] += 1
        if len(self.names[kind]) < NUM_NAMED:
            self.names[kind].append(str(name))

    def lines(self) -> list[str]:
        """Returns a line of text for each kind of defect.

        A line has the number of objects or images with the defect, and up to `NUM_NAMED` of their
        ids or file names.
        """
        return [
            f"{count} {kind}: {', '.join(self.names[kind])}"
            + (" ..." if count > len(self.names[kind]) else "")
            for kind, count in self.counts.items()
        ]


CLIPPED = "boxes that leave their image, clipped (annotations)"
NO_AREA = "objects without area, left out (annotations)"
NO_BOX = "objects whose box is not four numbers, left out (annotations)"
NO_CATEGORY = "objects of a category that the file does not list, left out (annotations)"
NO_IMAGE = "objects of an image that the file does not list, left out (annotations)"
NO_MASK = "objects without a usable segmentation, left out (annotations)"
NO_FILE = "images whose file is missing, left out (files)"
NO_OBJECT = "images without an object, left out (files)"


class ImageObjects(NamedTuple):
    """The objects of one image, in the image's pixels.

    Attributes:
        boxes: (n, 4) float32: left, top, right, bottom.
        labels: (n,) int64, the class of each object, counted from 0.
        segmentations: For each object its polygons, (points, 2) float64 each, or its compressed run
            lengths; an empty list if the dataset has no masks.
        crowd_boxes: (m, 4) float32, regions in which single objects are not annotated: left, top,
            right, bottom.
        image_id: The image's id in the dataset.
        height: Height of the image.
        width: Width of the image.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    segmentations: list[list[NDArray[np.float64]] | bytes]
    crowd_boxes: NDArray[np.float32]
    image_id: int
    height: int
    width: int


def read_json(
    path: str,
    *,
    where: str,
    flag: str,
    hook: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Any:
    """Reads a user's JSON file.

    Args:
        path: Path of the file.
        where: Kind of the file, for messages.
        flag: The flag by which the user named the file, for messages.
        hook: Called with each JSON object as soon as it is parsed; returns what replaces the
            object.

    Raises: DataError: if the file is missing or not JSON.
    """
    return files.read_json(
        Path(path),
        where=where,
        remedy=f"Fetch the file again, or set {flag}.",
        of=DataError,
        max_bytes=MOST_BYTES,
        # An object with such a number is left out, not the file.
        long_as_float=True,
        **({"object_hook": hook} if hook else {}),
    )


def read_objects(
    path: str,
    findings: Findings,
    *,
    find_file: Callable[[str], str | None],
    keep_empty: bool,
    where: str = "data.root",
) -> Made:
    """Reads an annotation file in COCO's or Objects365's format into the arrays of a `CocoSet`.

    Images are sorted by id. The objects of an image are in the file's order. Image i has the
    objects first[i] to first[i + 1] - 1. An object has polygons or run lengths, not both. Object j
    has the polygons polygon_first[j] to polygon_first[j + 1] - 1, or the run lengths
    rle[rle_first[j]:rle_first[j + 1]]. Polygon k has the points point_first[k] to
    point_first[k + 1] - 1. The arrays besides the names are

        image_ids (images,) int64; sizes (images, 2) int32, height and width; first (images + 1,)
        boxes (objects, 4) float32; labels (objects,) int64; crowd (objects,) bool
        polygon_first, point_first, rle_first: int64; points (points, 2) float64; rle: uint8

    Args:
        path: The JSON file.
        findings: Collects the annotations and images that are left out or clipped.
        find_file: Returns the path of an image, given its `file_name`, or None if the image is to
            be left out.
        keep_empty: Whether images without an object are kept.
        where: The field that names the dataset, for messages.

    Returns: the arrays, and the `facts` of a `Listing`, which include categories and findings.
    Raises: DataError: if the file is not in this format.
    """
    content = read_json(path, where="annotations", flag=f"--{where} FOLDER", hook=_packed)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise _not_coco(path, f"no list {key!r}", where)
    try:
        categories = sorted((_whole(c["id"]), str(c["name"])) for c in content["categories"])
        # Read here, so that a missing key is found before hours of training.
        facts = {
            _whole(image["id"]): (_name_of(image), *_size_of(image)) for image in content["images"]
        }
    except (KeyError, TypeError) as error:
        raise _not_coco(path, f"an entry without {error}", where) from error
    except (ValueError, OverflowError) as error:
        raise _not_coco(path, f"an entry with {error}", where) from error
    if len(facts) < len(content["images"]) or len(dict(categories)) < len(categories):
        raise _not_coco(path, "two images or two categories with the same id", where)
    by_image: dict[int, list[dict[str, Any]]] = {number: [] for number in facts}
    has_masks = False
    for entry in content["annotations"]:
        if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int):
            raise _not_coco(path, "an annotation without image_id, a whole number", where)
        has_masks = has_masks or bool(entry.get("segmentation"))
        entries = by_image.get(entry["image_id"])
        if entries is None:
            findings.add(NO_IMAGE, entry.get("id", "without id"))
        else:
            entries.append(entry)
    labels = {category: label for label, (category, _) in enumerate(categories)}
    arrays = _Arrays(findings, labels, has_masks)
    used_images: list[tuple[str, int]] = []
    for number, (name, height, width) in sorted(facts.items()):
        entries = by_image.pop(number)
        if (image_path := find_file(name)) is None:
            findings.add(NO_FILE, name)
        elif arrays.add_image(entries, height, width, keep_empty=keep_empty):
            used_images.append((image_path, number))
        else:
            findings.add(NO_OBJECT, name)
    names = [os.fsencode(name) for name, _ in used_images]
    arrays = {
        "image_ids": np.array([number for _, number in used_images], dtype=np.int64),
        "sizes": np.array([facts[n][1:] for _, n in used_images], dtype=np.int32).reshape(-1, 2),
        **arrays.finish(),
    }
    category_ids, category_names = zip(*categories, strict=True) if categories else ((), ())
    digest = hashlib.sha256(b"\0".join(names))
    digest.update(repr((category_ids, category_names)).encode())
    for values in arrays.values():
        digest.update(values.tobytes())
    return (
        {
            "names": np.frombuffer(b"".join(names), dtype=np.uint8),
            "ends": np.cumsum([len(name) for name in names], dtype=np.int64),
            **arrays,
        },
        {
            "fingerprint": digest.hexdigest(),
            "category_ids": category_ids,
            "category_names": category_names,
            "has_masks": has_masks,
            "counts": findings.counts,
            "examples": findings.names,
        },
    )


class _Arrays:
    """Collects the objects of one image after another, in the arrays that `read_objects` describes.

    Args:
        findings: Collects the objects that are left out or clipped.
        labels: The label of each category id.
        has_masks: Whether objects must have a segmentation.
    """

    def __init__(self, findings: Findings, labels: Mapping[int, int], has_masks: bool) -> None:
        self.findings, self.labels_of, self.has_masks = findings, labels, has_masks
        self.first, self.boxes, self.labels = array("q", [0]), array("f"), array("q")
        self.crowd, self.polygon_first = array("b"), array("q", [0])
        self.point_first, self.points = array("q", [0]), array("d")
        self.rle_first, self.rle = array("q", [0]), bytearray()

    def add_image(
        self, entries: Iterable[dict[str, Any]], height: int, width: int, *, keep_empty: bool
    ) -> bool:
        """Adds an image and its usable objects; returns False if the image is left out.

        Args:
            entries: The image's annotations.
            height: Height of the image.
            width: Width of the image.
            keep_empty: Whether the image is added even if it has no objects other than crowds.
        """
        usable = []
        for entry in entries:
            try:
                usable.append(self._checked(entry, height, width))
            except _Unusable as why:
                self.findings.add(*why.args)
        if not keep_empty and all(crowd for _, _, crowd, _ in usable):
            return False
        for box, label, crowd, segmentation in usable:
            self.boxes.extend(box)
            self.labels.append(label)
            self.crowd.append(crowd)
            self._add_segmentation(segmentation)
        self.first.append(len(self.labels))
        return True

    def finish(self) -> dict[str, Any]:
        return {
            "first": np.array(self.first),
            "boxes": np.array(self.boxes, dtype=np.float32).reshape(-1, 4),
            "labels": np.array(self.labels, dtype=np.int64),
            "crowd": np.array(self.crowd, dtype=bool),
            "polygon_first": np.array(self.polygon_first),
            "point_first": np.array(self.point_first),
            "points": np.array(self.points, dtype=np.float64).reshape(-1, 2),
            "rle_first": np.array(self.rle_first),
            "rle": np.frombuffer(bytes(self.rle), dtype=np.uint8),
        }

    def _checked(
        self, entry: dict[str, Any], height: int, width: int
    ) -> tuple[list[float], int, bool, list[array[float]] | bytes]:
        name = entry.get("id", "without id")
        category = entry.get("category_id")
        if not isinstance(category, int) or category not in self.labels_of:
            raise _Unusable(NO_CATEGORY, f"{name} of {category}")
        box = entry.get("bbox")
        if not is_box(box):
            raise _Unusable(NO_BOX, name)
        sides = (box[0], box[1], box[0] + box[2], box[1] + box[3])
        clipped = [max(sides[0], 0), max(sides[1], 0), min(sides[2], width), min(sides[3], height)]
        if clipped[0] >= clipped[2] or clipped[1] >= clipped[3] or entry.get("area") == 0:
            raise _Unusable(NO_AREA, name)
        crowd = bool(entry.get("iscrowd", 0))
        segmentation: list[array[float]] | bytes = []
        if self.has_masks and not crowd:
            try:
                segmentation = _segmentation(entry.get("segmentation"), height, width)
            except ValueError as error:
                raise _Unusable(NO_MASK, f"{name} ({error})") from None
        if max(abs(a - b) for a, b in zip(clipped, sides, strict=True)) > OUTSIDE_PIXELS:
            self.findings.add(CLIPPED, name)
        return clipped, self.labels_of[category], crowd, segmentation

    def _add_segmentation(self, segmentation: list[array[float]] | bytes) -> None:
        if isinstance(segmentation, bytes):
            self.rle += segmentation
        else:
            for polygon in segmentation:
                self.points.extend(polygon)
                self.point_first.append(len(self.points) // 2)
        self.polygon_first.append(len(self.point_first) - 1)
        self.rle_first.append(len(self.rle))


class _Unusable(Exception):
    """Raised to leave out an annotation.

    Its two arguments are the kind of defect, as words for a message, and the annotation's id.
    """


def _packed(entry: dict[str, Any]) -> dict[str, Any]:
    """Replaces polygons in a JSON object by arrays, in place, and returns the object.

    `read_json` calls this function for each object of the file. Most numbers of COCO's file belong
    to polygons, and take 8 bytes in an array instead of 32.

    Args:
        entry: A JSON object. It stays unchanged if it has no list of polygons as `segmentation`.
    """
    polygons = entry.get("segmentation")
    if isinstance(polygons, list):
        # A value that is not a list of numbers stays, and is found when the annotation is checked.
        with suppress(TypeError, OverflowError):
            entry["segmentation"] = [array("d", polygon) for polygon in polygons]
    return entry


def _segmentation(value: Any, height: int, width: int) -> list[array[float]] | bytes:
    """Checks the segmentation of an annotation, and returns its usable part.

    Args:
        value: The segmentation after `_packed`: a list of polygons, or a dict of run lengths.
        height: Height of the image.
        width: Width of the image.

    Returns: the polygons that have at least three points, as x, y, x, y ..., or compressed run
        lengths.
    Raises:
        ValueError: if there is no such polygon, if a polygon lies far outside the image, or if the
            run lengths are invalid.
    """
    if isinstance(value, dict):
        return masks.compress(value, height, width)
    if not isinstance(value, list) or not value:
        raise ValueError("none")
    polygons = [
        p
        for p in value
        if isinstance(p, array) and len(p) >= 6 and len(p) % 2 == 0 and all(map(math.isfinite, p))
    ]
    if not polygons:
        raise ValueError("no polygon of at least three points")
    # Filling needs memory in proportion to the edges, which a stray number makes huge.
    for xy in polygons:
        if min(xy) < -max(height, width) or max(xy) > 2 * max(height, width):
            raise ValueError("a polygon far outside its image")
    return polygons


def is_number(value: Any, most: float = 2.0**31) -> bool:
    """Whether `value`, from a JSON file, is a finite number with a magnitude of at most `most`.

    Numbers in JSON can be larger than a float or a 64-bit integer can hold. Since bool is a
    subclass of int, true and false count as numbers.
    """
    return isinstance(value, (int, float)) and -most <= value <= most


def is_box(value: Any) -> bool:
    """Whether `value`, from a JSON file, is a list of four numbers that pass `is_number`."""
    return isinstance(value, list) and len(value) == 4 and all(map(is_number, value))


def _whole(value: Any, most: int = 2**63 - 1) -> int:
    """Converts `value` by int(), which truncates a fraction and reads the digits of a text.

    Raises:
        TypeError, ValueError or OverflowError: if int() fails, or if the result has a magnitude of
            more than `most`.
    """
    number = int(value)
    if not -most <= number <= most:
        raise ValueError(f"a number of more than {most}")
    return number


def _size_of(image: Mapping[str, Any]) -> tuple[int, int]:
    """Returns height and width, in pixels, of `image`, an entry of the list `images` in the file.

    Raises:
        KeyError, TypeError, ValueError or OverflowError: if height or width is missing, is no
            number or is negative, or if the image has more than `_MOST_PIXELS` pixels.
    """
    height, width = (_whole(image[side], _MOST_PIXELS) for side in ("height", "width"))
    if min(height, width) < 0 or height * width > _MOST_PIXELS:
        raise ValueError(f"an image of {height} x {width} pixels")
    return height, width


def _name_of(image: Mapping[str, Any]) -> str:
    # LVIS names an image only by its web address, which ends with its path: train2017/NAME.jpg.
    return str(
        image["coco_url"]
        if "coco_url" in image and "file_name" not in image
        else image["file_name"]
    )


def _not_coco(path: str, got: str, where: str) -> DataError:
    return DataError(
        f"annotations: not COCO's format; got {got} in {path!r}, expected images (id, file_name, "
        "height, width), annotations (image_id, category_id, bbox) and categories (id, name). "
        f"Set --{where} to a folder with such a file."
    )

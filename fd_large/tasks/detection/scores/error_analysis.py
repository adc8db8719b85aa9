"""Finds missed objects and false detections in each image.

Detections are matched to objects in the order of falling score. A detection is right if its box has
an IoU of at least `LEAST_IOU` with an object of its class that is not matched yet. Otherwise it is
wrong, unless it lies in a crowd of its class, as in the official evaluation. Torch is not imported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fd_large.tasks.detection.data.masks import coco_masks
from fd_large.tasks.detection.scores.results import Result

LEAST_SCORE = 0.5
LEAST_IOU = 0.5


class Compared(NamedTuple):
    """The true objects of an image, its detections, and the errors among them.

    Attributes:
        objects: Annotations of the ground truth, without crowds.
        missed: For each of `objects`, whether no detection was matched to it.
        seen: The detections with a score of at least `LEAST_SCORE`, by falling score.
        false: For each of `seen`, whether the detection is wrong.
    """

    objects: list[dict[str, Any]]
    missed: list[bool]
    seen: list[Result]
    false: list[bool]

    @property
    def num_errors(self) -> int:
        """Number of missed objects plus false detections."""
        return sum(self.missed) + sum(self.false)


def compare(ground_truth: Mapping[str, Any], results: Sequence[Result]) -> dict[int, Compared]:
    """Compares the boxes of objects and detections in each image.

    Args:
        ground_truth: Result of `scoring.read_ground_truth`.
        results: Detections in COCO's format, with boxes.

    Returns: {image id: comparison} for all images of the ground truth.
    """
    annotations, of_image = defaultdict(list), defaultdict(list)
    for annotation in ground_truth["annotations"]:
        annotations[annotation["image_id"]].append(annotation)
    for result in results:
        if result["score"] >= LEAST_SCORE:
            of_image[result["image_id"]].append(result)
    return {
        image["id"]: _compare(annotations[image["id"]], of_image[image["id"]])
        for image in ground_truth["images"]
    }


def worst(compared: Mapping[int, Compared], count: int) -> list[int]:
    """Returns the ids of up to `count` images with errors, those with the most errors first.

    Args:
        compared: {image id: comparison}, the result of `compare`.
        count: Largest number of images.
    """
    by_errors = sorted(compared, key=lambda number: (-compared[number].num_errors, number))
    return [number for number in by_errors[:count] if compared[number].num_errors]


def _compare(annotations: list[dict[str, Any]], results: list[Result]) -> Compared:
    objects = [annotation for annotation in annotations if not annotation["iscrowd"]]
    crowds = [annotation for annotation in annotations if annotation["iscrowd"]]
    detections = sorted(results, key=lambda result: -result["score"])
    covers = _iou(detections, objects, crowd=False)
    in_crowd = _iou(detections, crowds, crowd=True) >= LEAST_IOU
    taken = np.zeros(len(objects), dtype=bool)
    false = []
    for place in range(len(detections)):
        free = np.where(taken, 0.0, covers[place])
        if len(free) and free.max() >= LEAST_IOU:
            taken[free.argmax()] = True
            false.append(False)
        else:
            false.append(not in_crowd[place].any())
    return Compared(objects, (~taken).tolist(), detections, false)


def _iou(detections: list[Result], objects: list[dict[str, Any]], *, crowd: bool) -> np.ndarray:
    """Returns the IoU of each detection with each object, (detections, objects).

    The IoU of a detection and an object of different classes is 0.

    Args:
        detections: Detections in COCO's results format.
        objects: Annotations of the ground truth.
        crowd: If True, the objects are crowds, and the result is the share of the detection's area
            that lies inside the crowd, in place of the IoU.
    """
    if not detections or not objects:
        return np.zeros((len(detections), len(objects)))
    boxes = [
        np.array([entry["bbox"] for entry in side], dtype=float) for side in (detections, objects)
    ]
    same = np.array(
        [[r["category_id"] == o["category_id"] for o in objects] for r in detections], dtype=float
    )
    return np.asarray(coco_masks().iou(*boxes, [int(crowd)] * len(objects))) * same

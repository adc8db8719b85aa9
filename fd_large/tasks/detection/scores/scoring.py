"""The official COCO evaluation: twelve metrics for boxes and for masks, AP by class, and curves.

faster-coco-eval computes the metrics, with the same values as pycocotools (a test compares them).
Detections in a crowd are neither right nor wrong. Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fd_large.errors import DataError
from fd_large.probes.redrawn import redraws
from fd_large.tasks.detection.data.masks import coco_masks
from fd_large.tasks.detection.data.objects import is_box, is_number, read_json
from fd_large.tasks.detection.scores.results import Result

NUMBERS = (
    "AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl",
)  # fmt: skip
KINDS = {"box": "bbox", "mask": "segm"}
CURVES = (0.5, 0.75)
PAIRS_AT_ONCE = 1_000_000
"""Largest number of (image, class) pairs that are evaluated at once. A pair takes 1.5 kB of memory
(measured), and COCO has 400,000 pairs."""


class ClassScore(NamedTuple):
    """The scores of one category.

    Attributes:
        category_id: The category's id in the annotations.
        name: The category's name.
        ap: Average precision, mean over IoU 0.5 to 0.95, in 0..1; None if the category has no
            object other than crowds.
        ap50: Average precision at IoU 0.5, in 0..1; None if the category has no object other than
            crowds.
    """

    category_id: int
    name: str
    ap: float | None
    ap50: float | None


@dataclass(frozen=True)
class KindScores:
    """The scores of either boxes or masks.

    Attributes:
        numbers: COCO's twelve metrics, by the names in `NUMBERS`, in 0..1; -1 if no object counts
            for the metric.
        classes: The scores of each category, in the order of the ids.
        curves: For each IoU in `CURVES` the precision at recall 0, 0.01 ... 1, averaged over the
            classes that have objects.
    """

    numbers: dict[str, float]
    classes: tuple[ClassScore, ...]
    curves: dict[float, tuple[float, ...]]


@dataclass(frozen=True)
class Scores:
    """The scores of detections on a dataset.

    Attributes:
        kinds: Scores of "box" and "mask"; a kind is missing if it could not be scored.
        num_images: Number of images in the ground truth.
        num_results: Number of scored detections.
    """

    kinds: dict[str, KindScores]
    num_images: int
    num_results: int

    def to_dict(self) -> dict[str, Any]:
        """Returns the scores as a dict of JSON types, whose entries are part of scores.json."""
        return {
            "num_images": self.num_images,
            "num_results": self.num_results,
            **{
                kind: {
                    "numbers": scores.numbers,
                    "classes": [of_class._asdict() for of_class in scores.classes],
                    "precision_at_recall_0_to_1": {
                        str(iou): curve for iou, curve in scores.curves.items()
                    },
                }
                for kind, scores in self.kinds.items()
            },
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scores:
        """Returns the scores from the result of `to_dict`, which may have been stored as JSON."""
        kinds = {}
        for kind in KINDS:
            if kind in values:
                of_kind = values[kind]
                curves = of_kind["precision_at_recall_0_to_1"]
                kinds[kind] = KindScores(
                    of_kind["numbers"],
                    tuple(ClassScore(**of_class) for of_class in of_kind["classes"]),
                    {float(iou): tuple(curve) for iou, curve in curves.items()},
                )
        return cls(kinds, values["num_images"], values["num_results"])

    def named(self) -> dict[str, float]:
        """Returns COCO's metrics of boxes and of masks, by names like `box_AP`."""
        return {
            f"{kind}_{name}": value
            for kind, of_kind in self.kinds.items()
            for name, value in of_kind.numbers.items()
        }


def read_ground_truth(path: str, only: Sequence[int] = ()) -> dict[str, Any]:
    """Reads ground-truth annotations, fills in optional entries, and numbers annotations from 1.

    Args:
        path: The annotation file.
        only: The ids of the images to keep, with their annotations; empty for all images.

    Raises: DataError: if the file is missing or not in COCO's format.
    """
    truth = read_json(path, where="annotations", flag="--annotations FILE")
    for key in ("images", "annotations", "categories"):
        if not isinstance(truth, dict) or not isinstance(truth.get(key), list):
            raise _no_truth(path, f"no list {key!r}")
    try:
        for entries, keys in (("images", ("id",)), ("categories", ("id", "name"))):
            for entry in truth[entries]:
                for key in keys:
                    entry[key]
                _id(entry["id"])
        for number, entry in enumerate(truth["annotations"], start=1):
            # From 1: the evaluation takes an id of 0 for "not matched".
            entry["id"] = number
            entry["iscrowd"] = int(bool(entry.get("iscrowd")))
            of_box = entry["bbox"][2] * entry["bbox"][3]
            entry["area"] = of_box if entry.get("area") is None else entry["area"]
            if not is_box(entry["bbox"]) or not is_number(entry["area"], 2.0**62):
                raise ValueError("a box that is not four numbers, or an invalid area")
            _id(entry["image_id"]), _id(entry["category_id"])
    except (KeyError, TypeError, IndexError) as error:
        raise _no_truth(path, f"an entry without {error}") from error
    except (ValueError, OverflowError) as error:
        raise _no_truth(path, f"an entry with {error}") from error
    if image_ids := frozenset(only):
        for entries, key in (("images", "id"), ("annotations", "image_id")):
            truth[entries] = [entry for entry in truth[entries] if entry[key] in image_ids]
    return truth


def _id(value: Any) -> None:
    if not is_number(value, 2.0**62):
        raise ValueError("an id that is not a 64-bit number")


def score(ground_truth: dict[str, Any], results: Sequence[Result]) -> Scores:
    """Scores detections by COCO's metrics, for boxes and for masks.

    Boxes are scored if all results have a box. Masks are scored if all results have a mask and the
    ground truth has masks. The area by which a detection counts as small, medium or large is that
    of its box when boxes are scored, and that of its mask when masks are scored.

    Args:
        ground_truth: Result of `read_ground_truth`; all its images count.
        results: Detections in these images, in COCO's format.

    Raises:
        DataError: if a result has an image or category that the ground truth lacks, if a mask does
            not have the size of its image, or if neither boxes nor masks can be scored.
    """
    coco_masks()
    _check(ground_truth, results)
    kinds = {}
    for kind, iou_type in KINDS.items():
        # A list without detections scores 0 in whatever the ground truth has.
        key = "bbox" if kind == "box" else "segmentation"
        of_truth = kind == "box" or any(a.get(key) for a in ground_truth["annotations"])
        if of_truth and all(key in result for result in results):
            kinds[kind] = _evaluate(ground_truth, results, key, iou_type)
    if not kinds:
        raise DataError(
            "detections: nothing to score; got results of which some lack a box and some a mask, "
            "or masks for annotations without masks, expected boxes or masks in all. Correct "
            "--detections."
        )
    return Scores(kinds, len(ground_truth["images"]), len(results))


MOST_REDRAWN = 2_000_000
"""Largest number of classes times images for which `redrawn_aps` computes APs. COCO has 0.4
million, which take a minute, and Objects365 has 29 million."""


def redrawn_aps(
    ground_truth: dict[str, Any], results: Sequence[Result], scores: Scores
) -> dict[str, tuple[float, np.ndarray]]:
    """Computes the AP of boxes and of masks on bootstrap draws of the images (`probes.redrawn`).

    Detections are matched to objects only once. A draw counts the matches of an image as often as
    it contains the image.

    Args:
        ground_truth: Result of `read_ground_truth`.
        results: Detections in these images, in COCO's format.
        scores: Result of `score` for these detections.

    Returns: {name: (AP on the original images, APs on the D draws as an array (D,))}. The names are
        `box_AP` and `mask_AP`, as far as `scores` has boxes and masks. The result is empty if the
        number of classes times the number of images exceeds `MOST_REDRAWN`, since the computation
        would take too long.
    """
    from faster_coco_eval import COCOeval_faster
    from faster_coco_eval.faster_eval_api_cpp import COCOevalAccumulate

    ids = sorted(category["id"] for category in ground_truth["categories"])
    # The order of the evaluation.
    num_images = len(ground_truth["images"])
    if len(ids) * num_images > MOST_REDRAWN:
        return {}
    drawn = [np.repeat(np.arange(num_images), counts) for counts in redraws(num_images)]
    redrawn = {}
    for kind, of_kind in scores.kinds.items():
        key = "bbox" if kind == "box" else "segmentation"
        # A class at a time: matches are copied for every draw.
        precisions: list[list[np.ndarray]] = [[] for _ in drawn]
        for category in ids:
            truth, detections = _loaded(ground_truth, results, [category], key)
            evaluation = COCOeval_faster(
                truth, detections, KINDS[kind], print_function=_silent, separate_eval=True
            )
            settings = evaluation.params
            settings.maxDets = settings.maxDets[-1:]
            settings.areaRng, settings.areaRngLbl = settings.areaRng[:1], settings.areaRngLbl[:1]
            evaluation.evaluate()
            matches = evaluation._evalImgs_cpp
            for places, of_draw in zip(drawn, precisions, strict=True):
                some = [matches[place] for place in places]
                of_draw.append(COCOevalAccumulate(evaluation._paramsEval, some)["precision"])
        means = [_mean(np.concatenate(of_draw)) for of_draw in precisions]
        aps = np.array([np.nan if mean is None else mean for mean in means])
        redrawn[f"{kind}_AP"] = of_kind.numbers["AP"], aps
    return redrawn


def _evaluate(
    ground_truth: dict[str, Any], results: Sequence[Result], key: str, iou_type: str
) -> KindScores:
    from faster_coco_eval import COCOeval_faster

    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    ids = sorted(names)
    at_once = max(1, PAIRS_AT_ONCE // max(1, len(ground_truth["images"])))
    parts = [
        _count(ground_truth, results, ids[start : start + at_once], key, iou_type)
        for start in range(0, max(1, len(ids)), at_once)
    ]
    # Classes are counted independently of each other; the metrics are means over them.
    precision = np.concatenate([precision for precision, _ in parts], axis=2)
    recall = np.concatenate([recall for _, recall in parts], axis=1)
    evaluation = COCOeval_faster(None, None, iou_type, print_function=_silent)
    evaluation.params.catIds = ids
    evaluation.eval = {"precision": precision, "recall": recall}
    evaluation.summarize()
    at_most_100 = precision[:, :, :, 0, -1]
    ious = evaluation.params.iouThrs
    classes = tuple(
        ClassScore(
            int(category),
            names[category],
            _mean(at_most_100[:, :, place]),
            _mean(at_most_100[0, :, place]),
        )
        for place, category in enumerate(ids)
    )
    occurs = [place for place, of_class in enumerate(classes) if of_class.ap is not None]
    curves = {}
    for iou in CURVES:
        at_iou = at_most_100[int(np.argmin(np.abs(ious - iou)))][:, occurs]
        curves[iou] = tuple(at_iou.mean(1).tolist()) if occurs else ()
    numbers = [float(number) for number in evaluation.stats]
    return KindScores(dict(zip(NUMBERS, numbers, strict=True)), classes, curves)


def _count(
    ground_truth: dict[str, Any],
    results: Sequence[Result],
    categories: Sequence[int],
    key: str,
    iou_type: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Matches the detections of some classes to the objects, and computes precision and recall.

    Args:
        ground_truth: Result of `read_ground_truth`.
        results: Detections in these images, in COCO's format.
        categories: Ids of the classes.
        key: "bbox" or "segmentation".
        iou_type: The library's name for `key`, "bbox" or "segm".

    Returns: precision, an array with the axes IoU, recall, class, area, largest number of
        detections; recall, an array with the axes IoU, class, area, largest number of detections.
        Both are -1 where a class has no objects.
    """
    from faster_coco_eval import COCOeval_faster

    try:
        truth, detections = _loaded(ground_truth, results, categories, key)
        evaluation = COCOeval_faster(truth, detections, iou_type, print_function=_silent)
        evaluation.evaluate()
        evaluation.accumulate()
    except (RuntimeError, ValueError) as error:  # its C++ on run lengths
        raise DataError(
            f"detections: a mask that cannot be read; got {error}, expected compressed run lengths "
            "of the images' sizes, in the detections and in the annotations. Write the masks with "
            "encode of pycocotools or faster-coco-eval."
        ) from error
    return evaluation.eval["precision"], evaluation.eval["recall"]


def _loaded(
    ground_truth: dict[str, Any], results: Sequence[Result], categories: Sequence[int], key: str
) -> tuple[Any, Any]:
    """Returns two `COCO` instances of faster-coco-eval, with objects and with detections.

    Args:
        ground_truth: Result of `read_ground_truth`.
        results: Detections in these images, in COCO's format.
        categories: Ids of the classes whose objects and detections are loaded.
        key: "bbox" or "segmentation", the only one of the two fields that detections get.
    """
    from faster_coco_eval import COCO

    ids = set(categories)
    # Copies, one level deep, since the evaluation adds entries to objects and detections.
    truth = COCO(
        {
            **ground_truth,
            "annotations": [{**a} for a in ground_truth["annotations"] if a["category_id"] in ids],
            "categories": [c for c in ground_truth["categories"] if c["id"] in ids],
        }
    )
    fields = ("image_id", "category_id", "score", key)
    # Masks are loaded without their boxes, whose areas would replace those of the masks.
    entries = [{name: r[name] for name in fields} for r in results if r["category_id"] in ids]
    return truth, truth.loadRes(entries)


def _mean(precision: np.ndarray) -> float | None:
    counted = precision[precision > -1]
    return float(counted.mean()) if len(counted) else None


def _silent(*_: object) -> None:
    """Prints nothing; given to the library in place of `print`."""


def _check(ground_truth: dict[str, Any], results: Sequence[Result]) -> None:
    sizes = {i["id"]: [i.get("height"), i.get("width")] for i in ground_truth["images"]}
    categories = {category["id"] for category in ground_truth["categories"]}
    strange = {r["image_id"] for r in results} - sizes.keys()
    if strange:
        raise DataError(
            f"detections: images that are not in the annotations; got {len(strange)} such "
            f"image_id ({_some(strange)}), expected only images of --annotations. Set "
            "--annotations to the file of these images."
        )
    strange = {r["category_id"] for r in results} - categories
    if strange:
        raise DataError(
            f"detections: categories that are not in the annotations; got category_id "
            f"{_some(strange)}, expected the file's own ids (COCO's have gaps, 1 to 90). Write the "
            "ids of the annotations, not labels that count from 0."
        )
    for result in results:
        segmentation = result.get("segmentation")
        if segmentation and segmentation["size"] != sizes[result["image_id"]]:
            raise DataError(
                f"detections: a mask of another size than its image; got {segmentation['size']} "
                f"for image_id {result['image_id']}, expected {sizes[result['image_id']]}. Write "
                "masks in the images' own pixels."
            )


def _some(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)[:5])) + (" ..." if len(numbers) > 5 else "")


def _no_truth(path: str, got: str) -> DataError:
    return DataError(
        f"annotations: not COCO's format; got {got} in {path!r}, expected images (id), annotations "
        "(image_id, category_id, bbox) and categories (id, name). Set --annotations to such a file."
    )

"""Reads, writes and merges files of detections in COCO's results format, without torch.

A result is `{"image_id", "category_id", "bbox": [left, top, width, height], "score"}`. If it has a
mask, `"segmentation": {"size": [height, width], "counts": text}` is added. Ids are those of the
annotations. Each rank writes its results to its own file, a shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fd_large.errors import DataError
from fd_large.files import replacing
from fd_large.tasks.detection.data.objects import is_box, is_number, read_json

Result = dict[str, Any]

SHARDS = "results_of_rank_*"
"""Glob pattern of all ranks' result files, including files whose writing was interrupted."""


def shard_of(folder: Path, rank: int) -> Path:
    """Returns the path of the result file of the rank `rank` in `folder`."""
    return folder / f"results_of_rank_{rank}.json"


def read_results(path: str | Path) -> list[Result]:
    """Reads and checks `path`, a JSON file of detections in COCO's results format.

    Raises: DataError: if the file is missing, or not in this format.
    """
    results = read_json(str(path), where="detections", flag="--detections FILE")
    if not isinstance(results, list):
        raise _no_results(f"{type(results).__name__} in {str(path)!r}")
    for number, result in enumerate(results):
        if problem := _problem(result):
            raise _no_results(f"{problem} in entry {number} of {str(path)!r}")
    return results


def write_results(path: str | Path, results: Sequence[Result]) -> None:
    """Writes results to a JSON file, which replaces an older file only when it is complete.

    Args:
        path: The JSON file.
        results: Detections in COCO's results format.
    """
    # json.dumps is C, json.dump is not: five times as fast.
    with replacing(Path(path)) as aside:
        aside.write_text(json.dumps(results, separators=(",", ":")))


def merge(shards: Iterable[Sequence[Result]]) -> list[Result]:
    """Merges the results of several ranks into one list, the same for any sharding of the images.

    If an image occurs in several shards, only the results in the first of them are kept. Equal
    results of an image are kept once. The list is sorted by image id. Results of an image stay in
    the order of the shard, by which the evaluation breaks ties between equal scores.

    Args:
        shards: The results of each rank.
    """
    of_image: dict[int, dict[tuple[Any, ...], Result]] = {}
    for shard in shards:
        of_shard: dict[int, dict[tuple[Any, ...], Result]] = {}
        for result in shard:
            mask = str(result.get("segmentation", {}).get("counts"))
            key = (result["category_id"], result["score"], *result.get("bbox", ()), mask)
            of_shard.setdefault(result["image_id"], {}).setdefault(key, result)
        of_image = of_shard | of_image
    return [result for number in sorted(of_image) for result in of_image[number].values()]


def _problem(result: Any) -> str | None:
    if not isinstance(result, dict):
        return f"{type(result).__name__}"
    for key in ("image_id", "category_id"):
        if not isinstance(result.get(key), int) or not is_number(result[key], 2.0**62):
            return f"no whole number {key!r}"
    score = result.get("score")
    if not is_number(score):
        return "no number 'score'"
    if "bbox" not in result and "segmentation" not in result:
        return "neither 'bbox' nor 'segmentation'"
    if not is_box(result.get("bbox", [0, 0, 0, 0])):
        return "a 'bbox' that is not four numbers"
    segmentation = result.get("segmentation", {"size": [], "counts": ""})
    if (
        not isinstance(segmentation, dict)
        or not isinstance(segmentation.get("size"), list)
        or not isinstance(segmentation.get("counts"), str)
    ):
        return "a 'segmentation' that is no size and compressed counts"
    return None


def _no_results(got: str) -> DataError:
    return DataError(
        f"detections: not COCO's results format; got {got}, expected a list of entries with "
        "image_id, category_id, score, and bbox or segmentation or both. Set --detections to such "
        "a file."
    )

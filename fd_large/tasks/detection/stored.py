"""The detector of a stored run: scored on a dataset, or drawn on images of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fd_large import distributed
from fd_large.atomic_files import out_folder, write_json
from fd_large.checkpoint import stream
from fd_large.checkpoint.read import Reader
from fd_large.data.decode import decode
from fd_large.data.folder import read_image
from fd_large.engine.checkpoint_models import stored_task
from fd_large.engine.job import Predicted, StoredScores
from fd_large.engine.zero.config import computes_in_bfloat16
from fd_large.errors import DataError
from fd_large.tasks.dense.geometry import resized_view
from fd_large.tasks.detection.data.annotations import CocoSet
from fd_large.tasks.detection.scores.annotated_images import draw_image, marks_of
from fd_large.tasks.detection.scores.collect import to_results
from fd_large.tasks.detection.scores.evaluation import Detect, evaluate, keep
from fd_large.tasks.detection.scores.tables import classes_table, numbers_table
from fd_large.tasks.detection.task import Detection


def detector(make: Callable[[], Detection], reader: Reader, *, precision: str) -> Detect:
    """Builds the detector of a checkpoint, whole on this process's device.

    Args:
        make: Constructs the task.
        reader: A checkpoint of it.
        precision: `engine.precision` of its recipe.
    """
    task = stored_task(make, reader, kind=stream.outcome(reader))
    if computes_in_bfloat16(precision):
        task.bfloat16()
    return task.to(distributed.device()).eval().detect


def score_stored(
    detect: Detect,
    images: CocoSet,
    folder: Path,
    *,
    test_size: tuple[int, int],
    batch_size: int,
    workers: int,
    max_pixels: int,
) -> StoredScores:
    """Scores a detector and writes results.json, scores.json and pictures; a collective.

    Args: See `evaluate`.
    Returns: tables and files on rank 0, nothing elsewhere.
    """
    out_folder(folder)
    outcome = evaluate(
        detect,
        images,
        folder,
        test_size=test_size,
        batch_size=batch_size,
        workers=workers,
        max_pixels=max_pixels,
    )
    if outcome is None:
        return StoredScores((), ())
    drawn = keep(outcome, images, folder, draw=True, max_pixels=max_pixels)
    return StoredScores(
        (numbers_table(outcome.scores), classes_table(outcome.scores)),
        (folder / "results.json", folder / "scores.json", *drawn),
    )


def predict_images(
    detect: Detect,
    images: Sequence[str],
    folder: Path,
    *,
    class_names: Sequence[str],
    test_size: tuple[int, int],
    max_pixels: int,
    least_score: float,
) -> Iterator[Predicted]:
    """Draws what a detector sees and writes it to predictions.json.

    Args:
        detect: The detector, in evaluation.
        images: Paths of image files.
        folder: Folder for predictions.json and the drawn images.
        class_names: Names by label.
        test_size: Shorter side and longest side of a resized image, in pixels.
        max_pixels: Larger images are refused.
        least_score: Least score of what is drawn and written.
    """
    device = distributed.device()
    out_folder(folder)
    short, long = test_size
    seen: dict[str, list[dict[str, Any]]] = {}
    for path in dict.fromkeys(images):
        try:
            image = decode(read_image(path), path, max_pixels=max_pixels)
        except DataError as error:
            yield Predicted(path, problem=str(error))
            continue
        view = resized_view(*image.shape[-2:], short_side=short, long_side=long)
        resized = view.image(image)
        size = torch.tensor([resized.shape[-2:]], device=device)
        results = to_results(
            detect(resized[None].to(device), size)[0],
            image_id=0,
            size=view.size,
            original_size=image.shape[-2:],
            category_ids=range(len(class_names)),
        )
        seen[path] = [
            {
                "class": class_names[result["category_id"]],
                **{key: result[key] for key in ("score", "bbox", "segmentation")},
            }
            for result in results
            if result["score"] >= least_score
        ]
        # Files with the same name in different folders are kept apart.
        drawn = folder / f"{len(seen)}_{Path(path).stem}.png"
        draw_image(image.permute(1, 2, 0).numpy(), marks_of(seen[path]), drawn)
        yield Predicted(path, f"{len(seen[path])} objects", drawn)
    write_json(folder / "predictions.json", seen)

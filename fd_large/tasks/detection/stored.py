"""The detector of a stored run: scored on a dataset, or drawn on images of the user's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from fd_large.engine.job import Predicted, StoredScores
from fd_large.files import out_folder
from fd_large.ranks import activity, distributed
from fd_large.tasks.dense.geometry import resized_view, sizes_of
from fd_large.tasks.dense.stored import Seen, predict_files
from fd_large.tasks.detection.data.annotations import CocoSet
from fd_large.tasks.detection.scores.annotated_images import draw_image, marks_of
from fd_large.tasks.detection.scores.collect import to_results
from fd_large.tasks.detection.scores.evaluation import evaluate
from fd_large.tasks.detection.scores.tables import classes_table, numbers_table
from fd_large.tasks.detection.scores.views import Model


def score_stored(
    model: Model,
    images: CocoSet,
    folder: Path,
    *,
    batch_size: int,
    workers: int,
    max_pixels: int,
) -> StoredScores:
    """Scores a detector and writes results.json, scores.json and pictures; a collective.

    Args: See `evaluate`.
    Returns: tables and files on rank 0, nothing elsewhere.
    """
    out_folder(folder)
    scoring = evaluate(
        model,
        images,
        folder,
        batch_size=batch_size,
        workers=workers,
        max_pixels=max_pixels,
        draw=True,
    )
    try:
        with activity.work("scoring the detections"):
            scored = scoring.scored()
    except BaseException:
        scoring.give_up()
        raise
    scoring.forget()
    if scored is None:
        return StoredScores((), ())
    numbers = numbers_table(scored.scores, tested=model.in_words())
    return StoredScores((numbers, classes_table(scored.scores)), scored.written)


def predict_images(
    model: Model,
    images: Sequence[str],
    folder: Path,
    *,
    class_names: Sequence[str],
    max_pixels: int,
    least_score: float,
) -> Iterator[Predicted]:
    """Draws what a detector sees and writes it to predictions.json.

    Args:
        model: The detector, in evaluation, and how it is tested.
        images: Paths of image files.
        folder: Folder for predictions.json and the drawn images.
        class_names: Names by label.
        max_pixels: Larger images are refused.
        least_score: Least score of what is drawn and written.
    """
    device = distributed.device()

    def see(image: Tensor, stem: str) -> Seen:
        resized = [
            resized_view(*image.shape[-2:], short_side=short, long_side=long).image(image)
            for short, long in model.views.sides
        ]
        (seen,) = model.detect(
            [pixels[None].to(device) for pixels in resized],
            [sizes_of([pixels]).to(device) for pixels in resized],
            sizes_of([image]).to(device),
        )
        results = to_results(
            seen,
            image_id=0,
            original_size=image.shape[-2:],
            category_ids=range(len(class_names)),
        )
        found = [
            {
                "class": class_names[result["category_id"]],
                **{key: result[key] for key in ("score", "bbox", "segmentation")},
            }
            for result in results
            if result["score"] >= least_score
        ]
        drawn = folder / f"{stem}.png"
        draw_image(image.permute(1, 2, 0).numpy(), marks_of(found), drawn)
        return found, f"{len(found)} objects", drawn

    return predict_files(see, images, folder, max_pixels=max_pixels)

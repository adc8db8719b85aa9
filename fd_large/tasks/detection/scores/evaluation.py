"""The COCO evaluation of a detector: ranks share the images, and a separate process scores."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from fd_large.files import kind_of
from fd_large.ranks import activity, distributed
from fd_large.recipes.file_names import STEP
from fd_large.tasks.detection.data.annotations import CocoSet
from fd_large.tasks.detection.data.loader import build_evaluation_loader
from fd_large.tasks.detection.scores.collect import keep_shard, to_results
from fd_large.tasks.detection.scores.results import Result
from fd_large.tasks.detection.scores.score_shards import NOTE, SCORES, Note
from fd_large.tasks.detection.scores.scoring_process import ScoringProcess, forget_shards
from fd_large.tasks.detection.scores.views import Model

log = logging.getLogger(__name__)


def evaluate(
    model: Model,
    images: CocoSet,
    folder: Path,
    *,
    batch_size: int,
    workers: int,
    max_pixels: int,
    draw: bool,
    between: Callable[[], None] = lambda: None,
) -> ScoringProcess:
    """Runs the detector on all images, and starts to score the detections; all ranks must call it.

    Args:
        model: The detector, in evaluation mode, with its test settings.
        images: The test images and their objects.
        folder: A folder on storage that all ranks share, for results.json, scores.json and plots.
        batch_size: Largest number of images in a forward.
        workers: Number of loading processes; 0 loads in this process.
        max_pixels: Images with more pixels are not read; their objects count as missed.
        draw: Whether to plot the worst images, some other images, and precision-recall curves.
        between: Called before each batch on every rank; may raise to end the evaluation.

    Returns: the scoring process, still running.
    Raises: DataError: on every rank, if the detections cannot be written.
    """
    loader = build_evaluation_loader(
        images,
        sides=model.views.sides,
        # Without a common size, a batch has one image, which no padding for others can change.
        batch_size=batch_size if model.views.square else 1,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=workers,
        max_pixels=max_pixels,
    )
    results: list[Result] = []
    unread = 0
    device = distributed.device()
    for batch in activity.counted(loader, "test images", "batches"):
        between()
        unread += len(batch.bad)
        for problem in batch.bad:
            log.warning("the objects of an unreadable image count as missed: %s", problem)
        detections = model.detect(
            [pixels.to(device, non_blocking=True) for pixels in batch.images],
            [sizes.to(device) for sizes in batch.sizes],
            batch.original_sizes.to(device),
        )
        for place, of_image in enumerate(detections):
            if batch.weights[place]:
                index = int(batch.indices[place])
                results += to_results(
                    of_image,
                    image_id=images.image_id(index),
                    original_size=batch.original_sizes[place],
                    category_ids=images.category_ids,
                )
    unread = int(distributed.sum_tensor(torch.tensor(unread, device=device)))
    if unread and distributed.is_main():
        log.warning(
            "%d of %d test images could not be read: the scores count their objects as missed",
            unread,
            len(images),
        )
    keep_shard(results, folder, Note(distributed.world_size(), unread, model.in_words()))
    return scoring_of(images, folder, draw=draw, max_pixels=max_pixels)


def scoring_of(images: CocoSet, folder: Path, *, draw: bool, max_pixels: int) -> ScoringProcess:
    """Starts, on rank 0, the process that scores the detections of all ranks in a folder.

    Args:
        images: The test images and their objects.
        folder: Folder of the detections, on storage that all ranks share; also for the results.
        draw: Whether to plot the worst images, some other images, and precision-recall curves.
        max_pixels: Images with more pixels are drawn as grey.

    Returns: an object for the process, on all ranks.
    """
    paths = {images.image_id(index): images[index] for index in range(len(images))} if draw else {}
    return ScoringProcess(
        folder, images.annotations, images=paths, max_pixels=max_pixels, only=images.only
    )


def left_in(folder: Path, last: int) -> tuple[int, Path] | None:
    """Finds a run's newest evaluation with unscored detections; all ranks must call it.

    The detections of an unscored evaluation that is older than a scored evaluation are out of date,
    and are deleted.

    Args:
        folder: The run's folder of evaluations.
        last: A step of training; evaluations that were made after later steps are ignored.

    Returns: the step and the folder of the evaluation, or None if there is no such evaluation.
    """
    evaluations: list[tuple[int, Path]] = []
    if distributed.is_main():
        for path in folder.glob(f"{STEP}*"):
            number = path.name.removeprefix(STEP)
            # Folders with other names, such as copies, are ignored.
            step = int(number) if number.isdecimal() else last + 1
            if step <= last and (kind_of(path / NOTE) or kind_of(path / SCORES)):
                evaluations.append((step, path))
        evaluations.sort()
        scored = [i for i, (_, path) in enumerate(evaluations) if not kind_of(path / NOTE)]
        if scored:
            for _, path in evaluations[: scored[-1]]:
                forget_shards(path)
            evaluations = evaluations[scored[-1] + 1 :]
    return distributed.broadcast_object(evaluations[-1] if evaluations else None)

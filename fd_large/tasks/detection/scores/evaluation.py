"""The COCO evaluation of a detector: every image once over the ranks, scored once on rank 0."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from fd_large import activity, distributed
from fd_large.atomic_files import write_json
from fd_large.errors import DataError
from fd_large.tasks.detection.data.annotations import CocoSet
from fd_large.tasks.detection.data.loader import build_evaluation_loader, read_image
from fd_large.tasks.detection.scores.collect import gather, to_results
from fd_large.tasks.detection.scores.evaluation_pictures import draw_evaluation
from fd_large.tasks.detection.scores.results import Result, write_results
from fd_large.tasks.detection.scores.scoring import Scores, read_ground_truth, score
from fd_large.tasks.detection.scores.views import Model

log = logging.getLogger(__name__)

RESULTS, SCORES = "results.json", "scores.json"
# Value of the pixels that are drawn for an image that cannot be read.
GREY = 128
SECONDS_BETWEEN_CALLS = 1.0
"""How often `between` is called while rank 0 scores."""

T = TypeVar("T")


class Outcome(NamedTuple):
    """What rank 0 has after an evaluation.

    Attributes:
        scores: COCO's numbers.
        results: The detections, in COCO's format.
        ground_truth: The annotations that they were scored against.
        unread: How many images could not be read; their objects count as missed.
        tested: How the detections were found, in words.
    """

    scores: Scores
    results: list[Result]
    ground_truth: dict[str, Any]
    unread: int
    tested: str


def evaluate(
    model: Model,
    images: CocoSet,
    folder: Path,
    *,
    batch_size: int,
    workers: int,
    max_pixels: int,
    between: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome | None:
    """Detects in all images and scores; a collective.

    Args:
        model: The detector, in evaluation mode, and how it is tested.
        images: The test images and their objects.
        folder: A folder that all ranks see, for results on their way.
        batch_size: Images a forward.
        workers: Processes that load.
        max_pixels: Larger images are refused.
        between: Called with (batches done, batches in all) before each batch and, when all are
            done, while rank 0 scores; on every rank alike. It may raise to end the evaluation.

    Returns: on rank 0; None elsewhere.
    Raises: DataError: on every rank, if the results cannot be scored.
    """
    loader = build_evaluation_loader(
        images,
        sides=model.views.sides,
        # Without a common size, images are seen one by one: others in the batch change nothing.
        batch_size=batch_size if model.views.square else 1,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=workers,
        max_pixels=max_pixels,
    )
    results: list[Result] = []
    unread = 0
    device = distributed.device()
    for done, batch in enumerate(activity.counted(loader, "test images", "batches")):
        between(done, len(loader))
        unread += len(batch.bad)
        for problem in batch.bad:
            log.warning("its objects count as missed: %s", problem)
        found = model.detect(
            [pixels.to(device, non_blocking=True) for pixels in batch.images],
            [sizes.to(device) for sizes in batch.sizes],
            batch.original_sizes.to(device),
        )
        for place, seen in enumerate(found):
            if batch.weights[place]:
                index = int(batch.indices[place])
                results += to_results(
                    seen,
                    image_id=images.image_id(index),
                    original_size=batch.original_sizes[place],
                    category_ids=images.category_ids,
                )
    unread = int(distributed.sum_tensor(torch.tensor(unread, device=device)))
    merged = gather(results, folder)
    if merged is not None and unread:
        log.warning(
            "%d of %d test images could not be read: the scores count their objects as missed",
            unread,
            len(images),
        )

    def scored() -> Outcome | None:
        if merged is None:
            return None
        truth = read_ground_truth(images.annotations)
        return Outcome(score(truth, merged), merged, truth, unread, model.in_words())

    with activity.work("scoring the detections"):
        return _beside(scored, lambda: between(len(loader), len(loader)))


def _beside(work: Callable[[], T], meanwhile: Callable[[], None]) -> T:
    """Does this rank's work in a thread and calls `meanwhile` on all ranks until all have done it.

    Ranks that waited for minutes in a collective would be taken for hung, and could not be stopped.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    # A daemon: after an exception of `meanwhile` it must not keep the process alive.
    thread = threading.Thread(target=run, name="scoring", daemon=True)
    thread.start()
    while True:
        thread.join(SECONDS_BETWEEN_CALLS)
        if not distributed.any_rank(thread.is_alive()):
            return distributed.together(done.result)
        meanwhile()


def keep(
    outcome: Outcome, images: CocoSet, folder: Path, *, draw: bool, max_pixels: int
) -> list[Path]:
    """Writes results.json and scores.json, and draws pictures; on rank 0.

    Args:
        outcome: What the evaluation found.
        images: The images that were evaluated.
        folder: A folder that exists.
        draw: Whether to draw the worst images, some others, and the curves.
        max_pixels: Larger images are refused.

    Returns: the pictures that were drawn.
    """
    write_results(folder / RESULTS, outcome.results)
    found = outcome.scores.to_dict()
    scores = {"unread_images": outcome.unread, "tested": outcome.tested, **found}
    write_json(folder / SCORES, scores)
    if not draw:
        return []
    places = {images.image_id(index): index for index in range(len(images))}

    def read(number: int) -> NDArray[np.uint8]:
        try:
            image = read_image(images, places[number], max_pixels)
        except DataError:  # It will be one of the worst; the evaluation has said why.
            return np.full((*images.size(places[number]), 3), GREY, dtype=np.uint8)
        return image.permute(1, 2, 0).numpy()

    return draw_evaluation(outcome.ground_truth, outcome.results, outcome.scores, read, folder)


def metrics_of(scores: Scores | None) -> dict[str, float]:
    """Returns the twelve numbers of boxes and of masks, by names like `box_AP`; a collective.

    Args:
        scores: What rank 0 has; None elsewhere.
    """
    found = None
    if scores is not None:
        found = {
            f"{kind}_{name}": value
            for kind, of_kind in scores.kinds.items()
            for name, value in of_kind.numbers.items()
        }
    return distributed.broadcast_object(found)

"""The COCO evaluation of a detector: every image once over the ranks, scored once on rank 0."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large import distributed
from fd_large.errors import DataError
from fd_large.tasks.detection.data.annotations import CocoSet
from fd_large.tasks.detection.data.loader import build_evaluation_loader, read_image
from fd_large.tasks.detection.heads.roi_heads import Detections
from fd_large.tasks.detection.scores.collect import gather, to_results
from fd_large.tasks.detection.scores.pictures import draw_evaluation
from fd_large.tasks.detection.scores.results import Result, write_results, write_text
from fd_large.tasks.detection.scores.scoring import Scores, read_ground_truth, score

log = logging.getLogger(__name__)

RESULTS, SCORES = "results.json", "scores.json"
# What stands for an image that cannot be read.
GREY = 128
SECONDS_BETWEEN_CALLS = 1.0
"""Of `between` while rank 0 scores."""

T = TypeVar("T")

Detect = Callable[[Tensor, Tensor], list[Detections]]
"""(images (B, 3, H, W) uint8, sizes (B, 2)) on the device -> what is seen; by all ranks alike."""


class Outcome(NamedTuple):
    """What rank 0 has after an evaluation.

    Attributes:
        scores: COCO's numbers.
        results: Detections in COCO's format.
        ground_truth: That they were scored against.
        unread: Images that could not be read; their objects count as missed.
    """

    scores: Scores
    results: list[Result]
    ground_truth: dict[str, Any]
    unread: int


def evaluate(
    detect: Detect,
    pictures: CocoSet,
    folder: Path,
    *,
    test_size: tuple[int, int],
    batch_size: int,
    workers: int,
    max_pixels: int,
    between: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome | None:
    """Detects in all images and scores; a collective.

    Args:
        detect: The detector, in evaluation.
        images: With their objects.
        folder: That all ranks see; for results on their way.
        test_size: Shorter side, and the most that the longer may be, in pixels.
        batch_size: Images a forward.
        workers: Processes that load.
        max_pixels: Larger images are refused.
        between: Told (batches done, batches in all) before each and, all done, while rank 0
            scores; on every rank alike; may raise to end it.

    Returns: on rank 0; None elsewhere.
    Raises: DataError: on every rank, if the results cannot be scored.
    """
    loader = build_evaluation_loader(
        pictures,
        short_side=test_size[0],
        long_side=test_size[1],
        batch_size=batch_size,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=workers,
        max_pixels=max_pixels,
    )
    results: list[Result] = []
    unread = 0
    device = distributed.device()
    for done, batch in enumerate(loader):
        between(done, len(loader))
        unread += len(batch.bad)
        for problem in batch.bad:
            log.warning("its objects count as missed: %s", problem)
        with torch.no_grad():
            found = detect(batch.images.to(device, non_blocking=True), batch.sizes.to(device))
        for place, seen in enumerate(found):
            if batch.weights[place]:
                index = int(batch.indices[place])
                results += to_results(
                    seen,
                    image_id=pictures.image_id(index),
                    size=batch.sizes[place],
                    original_size=batch.original_sizes[place],
                    category_ids=pictures.category_ids,
                )
    unread = int(distributed.sum_tensor(torch.tensor(unread, device=device)))
    merged = gather(results, folder)
    if merged is not None and unread:
        log.warning(
            "%d of %d test images could not be read: the scores count their objects as missed",
            unread,
            len(pictures),
        )

    def scored() -> Outcome | None:
        if merged is None:
            return None
        truth = read_ground_truth(pictures.annotations)
        return Outcome(score(truth, merged), merged, truth, unread)

    return _beside(scored, lambda: between(len(loader), len(loader)))


def _beside(work: Callable[[], T], meanwhile: Callable[[], None]) -> T:
    """Does this rank's work in a thread and calls `meanwhile` on all ranks till all have done it.

    Ranks that only waited for minutes in a collective would be taken for hung, and could not be
    stopped.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    # A daemon: what is left by an exception of `meanwhile` must not keep the process.
    thread = threading.Thread(target=run, name="scoring", daemon=True)
    thread.start()
    while True:
        thread.join(SECONDS_BETWEEN_CALLS)
        if not distributed.any_rank(thread.is_alive()):
            return distributed.together(done.result)
        meanwhile()


def keep(
    outcome: Outcome, pictures: CocoSet, folder: Path, *, draw: bool, max_pixels: int
) -> list[Path]:
    """Writes results.json and scores.json; rank 0.

    Args:
        outcome: Of the evaluation.
        images: That were evaluated.
        folder: Must be there.
        draw: Whether to draw the worst images, some others, and the curves.
        max_pixels: Larger images are refused.

    Returns: the images that were drawn.
    """
    write_results(folder / RESULTS, outcome.results)
    told = {"unread_images": outcome.unread, **outcome.scores.to_dict()}
    write_text(folder / SCORES, json.dumps(told, indent=1) + "\n")
    if not draw:
        return []
    places = {pictures.image_id(index): index for index in range(len(pictures))}

    def read(number: int) -> NDArray[np.uint8]:
        try:
            image = read_image(pictures, places[number], max_pixels)
        except DataError:  # Of the worst it will be one; the evaluation has told why.
            return np.full((*pictures.size(places[number]), 3), GREY, dtype=np.uint8)
        return image.permute(1, 2, 0).numpy()

    return draw_evaluation(outcome.ground_truth, outcome.results, outcome.scores, read, folder)


def metrics_of(scores: Scores | None) -> dict[str, float]:
    """The twelve numbers of boxes and of masks, as `box_AP`, on all ranks; a collective.

    Args:
        scores: On rank 0.
    """
    found = None
    if scores is not None:
        found = {
            f"{kind}_{name}": value
            for kind, of_kind in scores.kinds.items()
            for name, value in of_kind.numbers.items()
        }
    return distributed.broadcast_object(found)

"""The segmentation test: ranks share the images, and sum their confusion matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large.files import write_json
from fd_large.probes.redrawn import redraws
from fd_large.probes.redrawn import write as write_redrawn
from fd_large.ranks import distributed
from fd_large.tasks.dense.evaluation import (
    SCORES,
    Drawn,
    DrawnImages,
    draw_some,
    finite,
    forward_of_nothing,
    predict_all,
)
from fd_large.tasks.dense.windows import mean_of_windows
from fd_large.tasks.segmentation.data.classes import Classes
from fd_large.tasks.segmentation.data.dataset import SegmentationSet
from fd_large.tasks.segmentation.data.views import TestViews
from fd_large.tasks.segmentation.scores.areas import Scores, confusion, m_iou, scores_of
from fd_large.tasks.segmentation.scores.pictures import Row, draw_confusion, draw_rows
from fd_large.tasks.segmentation.scores.views import Logits, averaged, resized


class Outcome(NamedTuple):
    """The result of a test on N images, the same on all ranks.

    Attributes:
        scores: The scores of the whole dataset.
        errors: (N,) float64, the share of wrong pixels among each image's labelled pixels, in 0..1;
            NaN for an image that has no labelled pixels or could not be read.
        unread: Number of unreadable images, which are not scored.
        areas: (N, 3, K) int64, three counts of labelled pixels for each image and class: pixels
            with the class as label and prediction, pixels with the class as label, and pixels with
            the class as prediction.
    """

    scores: Scores
    errors: NDArray[np.float64]
    unread: int
    areas: NDArray[np.int64]


class Model(NamedTuple):
    """The model under test.

    Attributes:
        logits: Maps pixels (B, 3, h, w) uint8, on the device, to logits (B, K, h, w), in
            evaluation mode. If the model is sharded, all ranks must call it equally often.
        views: The sizes at which an image is tested, whole or by windows, and mirrored or not.
        at_once: Largest number of windows in a forward.
    """

    logits: Logits
    views: TestViews
    at_once: int = 1

    @torch.no_grad()
    def predict(self, views: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Predicts the class of each pixel of an image, (H, W) int64, on the device.

        Args:
            views: The image resized to each scale, (3, h, w) uint8.
            size: Height and width of the result.
        """
        logits = self._logits(views)
        if len(views) == 1 and not self.views.flip:
            # The probabilities of a single view are ordered as its logits are.
            return resized(next(logits)[0], size)[0].argmax(0)
        return averaged(logits, size)[0].argmax(0)

    def idle(self) -> None:
        """Runs a forward on a black image.

        Under ZeRO-3 all ranks must run the same number of forwards. A rank that has no image, or
        whose image needs fewer forwards than another rank's, makes up the difference by this call.
        """
        forward_of_nothing(self.logits, self.views.crop or self.views.short_side)

    def _logits(self, views: Sequence[Tensor]) -> Iterator[tuple[Tensor, bool]]:
        for image in views:
            for mirrored in (False, True) if self.views.flip else (False,):
                pixels = image[None].to(distributed.device(), non_blocking=True)
                pixels = pixels.flip(-1) if mirrored else pixels
                if self.views.crop:
                    places = self.views.windows(image.shape[-2], image.shape[-1])
                    logits = mean_of_windows(pixels, self.logits, places, at_once=self.at_once)
                else:
                    logits = self.logits(pixels)
                yield logits, mirrored


def evaluate(
    model: Model,
    images: SegmentationSet,
    *,
    workers: int,
    between: Callable[[], None] = lambda: None,
) -> Outcome:
    """Tests a model on all images; all ranks must call this function.

    Args:
        model: The model under test.
        images: The test images and their labels.
        workers: Number of loading processes; 0 loads in this process.
        between: Called before each image on every rank; may raise to end the test.
    """
    device, count = distributed.device(), images.num_classes
    counts = torch.zeros(count, count, dtype=torch.int64, device=device)
    # Each image is on one rank, so that sums over the ranks keep its counts.
    areas = torch.zeros(len(images), 3, count, dtype=torch.int64, device=device)
    unread = torch.zeros((), dtype=torch.int64, device=device)
    for item, predicted in predict_all(model, images, workers=workers, between=between):
        unread += bool(item.bad)
        if predicted is not None:
            table = confusion(predicted, item.truth.to(device), count)
            counts += table
            areas[item.index] = torch.stack([table.diagonal(), table.sum(1), table.sum(0)])
    counts, areas, unread = (distributed.sum_tensor(t) for t in (counts, areas, unread))
    of_images = areas.cpu().numpy()
    right, labelled = of_images[:, 0].sum(1), of_images[:, 1].sum(1)
    errors = np.divide(
        labelled - right, labelled, out=np.full(len(labelled), np.nan), where=labelled > 0
    )
    return Outcome(scores_of(counts.cpu().numpy()), errors, int(unread), of_images)


def keep(
    outcome: Outcome,
    some: DrawnImages | None,
    images: SegmentationSet,
    classes: Classes,
    folder: Path,
) -> list[Path]:
    """Writes scores.json and redrawn.json (bootstrap mIoUs), and draws plots.

    This function is called on rank 0 alone.

    Args:
        outcome: Result of the test.
        some: The images to draw, from `predict_some`. If None, no plots are drawn, not even that
            of the confusion matrix.
        images: The test images and their labels.
        classes: Names and colours of the classes.
        folder: The folder to write to, which is created if it is missing.

    Returns: the paths of the plots.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SCORES, _plain(outcome, classes))
    drawn_areas = np.tensordot(redraws(len(images)), outcome.areas, 1)
    mious = np.array([m_iou(*areas) for areas in drawn_areas])
    write_redrawn(folder, images.fingerprint, {"val_mIoU": (outcome.scores.m_iou, mious)})
    if some is None:
        return []

    def row(index: int, pixels: Drawn) -> Row:
        return Row(
            images.sample(index)[0].permute(1, 2, 0).numpy(),
            pixels.truth,
            pixels.predicted,
            Path(images[index]).name,
            f"{100 * (1 - outcome.errors[index]):.1f}% right",
        )

    drawn = draw_some(some, row, lambda rows, path: draw_rows(rows, classes, path), folder)
    draw_confusion(outcome.scores.counts, classes, folder / "confusion.png")
    return [*drawn, folder / "confusion.png"]


def _plain(outcome: Outcome, classes: Classes) -> dict[str, Any]:
    scores = outcome.scores
    return {
        "unread_images": outcome.unread,
        **{name: finite(value) for name, value in scores.numbers().items()},
        "classes": [
            {"name": name, "IoU": finite(iou), "Acc": finite(acc), "pixels": int(pixels)}
            for name, iou, acc, pixels in zip(
                classes.names, scores.iou, scores.acc, scores.counts.sum(1), strict=True
            )
        ],
        "confusion": scores.counts.tolist(),
    }

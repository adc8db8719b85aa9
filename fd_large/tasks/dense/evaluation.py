"""The test loop, which predicts every image once over the ranks, and some once more for plots."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large.ranks import activity, distributed
from fd_large.tasks.dense.loader import TestImage, TestImages, TestViews, build_test_loader
from fd_large.tasks.dense.pairs import PairedImages

log = logging.getLogger(__name__)

T = TypeVar("T")

SCORES = "scores.json"
NUM_IMAGES = 4
"""Number of images in a plot, of the worst images or of images that are the same in every test."""


class Model(Protocol):
    """The model under test; in evaluation mode, called by all ranks if it is sharded."""

    @property
    def views(self) -> TestViews:
        """The views of an image that the model is given."""

    @property
    def at_once(self) -> int:
        """Number of windows in a forward of `predict`."""

    def predict(self, views: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Predicts the pixels of an image: (H, W), on the device.

        Args:
            views: (3, h, w) uint8, the views of the image.
            size: Height and width of the result.
        """

    def idle(self) -> None:
        """Runs a dummy forward, on ranks without an image, so that the others do not wait."""


class Drawn(NamedTuple):
    """An image to draw, with truth and prediction.

    Attributes:
        truth: (H, W), true class or depth of each pixel.
        predicted: (H, W), predicted class or depth of each pixel.
    """

    truth: NDArray[Any]
    predicted: NDArray[Any]


DrawnImages = Mapping[str, Mapping[int, Drawn]]
"""The images to draw in each plot: by the plot's name, then by the image's index."""


def predict_all(
    model: Model, images: PairedImages, *, workers: int, between: Callable[[], None]
) -> Iterator[tuple[TestImage, Tensor | None]]:
    """Yields this rank's test images with their predictions; a collective.

    Unreadable images are named in the log. Unreadable and padding images have no prediction.

    Args:
        model: The model under test.
        images: The test images and their truth.
        workers: Processes that load.
        between: Called before each image on every rank; may raise to end the test.
    """
    loader = build_test_loader(
        images,
        model.views,
        rank=distributed.rank(),
        world_size=distributed.world_size(),
        workers=workers,
    )
    for item in activity.counted(loader, "test images", "images"):
        between()
        if item.bad:
            log.warning("left out of the test: %s", item.bad)
        yield item, _predict_together(model, item)


def predict_some(errors: NDArray[np.float64], model: Model, images: PairedImages) -> DrawnImages:
    """Predicts the images to draw once more, the worst ones and some others; a collective.

    The others are spread evenly over the dataset and the same in every test, for comparison. Only
    rank 0 reads images, so that an image that has become unreadable stops no rank.

    Args:
        errors: (N,), the error of each image; NaN for images that are not scored.
        model: The model under test.
        images: The test images and their truth.

    Returns: the images of each plot on rank 0; elsewhere plots without images.
    """
    scored = np.flatnonzero(~np.isnan(errors))
    worst = scored[np.argsort(-errors[scored], kind="stable")][:NUM_IMAGES]
    spread = np.linspace(0, len(scored) - 1, min(NUM_IMAGES, len(scored))).round().astype(int)
    groups = {"worst": worst.tolist(), "chosen": scored[spread].tolist()}
    drawn = {}
    for index in dict.fromkeys(groups["worst"] + groups["chosen"]):
        item = TestImages(images, model.views)[index if distributed.is_main() else -1]
        predicted = _predict_together(model, item)
        if predicted is not None:
            drawn[index] = Drawn(item.truth.numpy(), predicted.cpu().numpy())
    return {name: {i: drawn[i] for i in group if i in drawn} for name, group in groups.items()}


def draw_some(
    some: DrawnImages | None,
    row: Callable[[int, Drawn], T],
    draw: Callable[[list[T], Path], None],
    folder: Path,
) -> list[Path]:
    """Draws each plot of `predict_some` as NAME.png; returns the paths of the drawn plots.

    Args:
        some: The images to draw; None draws nothing.
        row: Makes the row of an image from its index and its `Drawn`.
        draw: Draws rows.
        folder: A folder that exists.
    """
    drawn = []
    for name, images in (some or {}).items():
        if images:
            path = folder / f"{name}.png"
            draw([row(index, image) for index, image in images.items()], path)
            drawn.append(path)
    return drawn


@torch.no_grad()
def forward_of_nothing(forward: Callable[[Tensor], Tensor], side: int) -> None:
    """Runs a forward of one black image with this side in pixels."""
    forward(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=distributed.device()))


def finite(value: float) -> float | None:
    """Returns a score for a JSON file, or None if it is not finite."""
    return float(value) if np.isfinite(value) else None


def _predict_together(model: Model, item: TestImage) -> Tensor | None:
    """Returns the prediction of this rank's image, or None without a readable one; a collective.

    Under ZeRO-3 every rank must run the same number of forwards.
    """
    size = (item.truth.shape[0], item.truth.shape[1])
    planned = model.views.num_forwards(*size, model.at_once) if item.views else 0
    most = int(distributed.max_rank(planned))
    predicted = model.predict(item.views, size) if item.views else None
    for _ in range(most - planned):
        model.idle()
    return predicted

"""The test loop of dense tasks: predicts all test images over the ranks, and draws some of them."""

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
"""Number of images in a plot of `predict_some`."""


class Model(Protocol):
    """A model under test, in evaluation mode.

    If the model is sharded, all ranks must call it equally often.
    """

    @property
    def views(self) -> TestViews:
        """The views of an image on which the model runs."""

    @property
    def at_once(self) -> int:
        """Largest number of windows in a forward of `predict`."""

    def predict(self, views: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Returns the predicted class or depth of each pixel of an image, (H, W), on the device.

        Args:
            views: (3, h, w) uint8 for each view: the image resized to the size of the view.
            size: Height and width of the result.
        """

    def idle(self) -> None:
        """Runs a forward on a black image, to run as many forwards as the other ranks."""


class Drawn(NamedTuple):
    """The truth and the prediction of an image that is drawn.

    Attributes:
        truth: (H, W), true class or depth of each pixel.
        predicted: (H, W), predicted class or depth of each pixel.
    """

    truth: NDArray[Any]
    predicted: NDArray[Any]


DrawnImages = Mapping[str, Mapping[int, Drawn]]
"""The images of each plot: {plot's name: {image's index: truth and prediction}}."""


def predict_all(
    model: Model, images: PairedImages, *, workers: int, between: Callable[[], None]
) -> Iterator[tuple[TestImage, Tensor | None]]:
    """Yields this rank's test images, each with the prediction of its pixels.

    All ranks must call this function. An image that cannot be read is named in the log, and has the
    prediction None. So has padding, which gives all ranks the same number of items.

    Args:
        model: The model under test.
        images: The test images and their truth.
        workers: Number of loading processes; 0 loads in this process.
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
    """Predicts the images of two plots once more; all ranks must call this function.

    The plot "worst" has the images with the largest errors. The plot "chosen" has images that are
    spread evenly over the dataset and are the same in every test. Only rank 0 reads images. If an
    image has become unreadable, the plot lacks it.

    Args:
        errors: (N,), the error of each image; NaN for images that are not scored.
        model: The model under test.
        images: The test images and their truth.

    Returns: the images of each plot on rank 0; plots without images on other ranks.
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
    """Draws each plot of `predict_some` into a file NAME.png, and returns the paths of the files.

    A plot without images is not drawn.

    Args:
        some: The result of `predict_some`; None draws nothing.
        row: Makes the row of an image from the image's index, and from its truth and prediction.
        draw: Draws a list of rows into a file.
        folder: Folder of the files, which must exist.
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
    """Runs a forward on a black image, whose result is not used.

    Args:
        forward: Runs on images (1, 3, side, side) uint8.
        side: Side of the image, in pixels.
    """
    forward(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=distributed.device()))


def finite(value: float) -> float | None:
    """Returns `value`, or None if `value` is infinite or NaN, which JSON cannot hold."""
    return float(value) if np.isfinite(value) else None


def _predict_together(model: Model, item: TestImage) -> Tensor | None:
    """Returns the prediction (H, W) of this rank's image; None if the rank has no readable image.

    All ranks must call this function. Since all ranks must run the same number of forwards under
    ZeRO-3, a rank that needs fewer forwards also runs `Model.idle`.
    """
    size = (item.truth.shape[0], item.truth.shape[1])
    planned = model.views.num_forwards(*size, model.at_once) if item.views else 0
    most = int(distributed.max_rank(planned))
    predicted = model.predict(item.views, size) if item.views else None
    for _ in range(most - planned):
        model.idle()
    return predicted

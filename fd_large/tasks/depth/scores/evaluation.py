"""The depth test: ranks share the images, and compute nine scores for each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
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
from fd_large.tasks.depth.data.dataset import DepthSet
from fd_large.tasks.depth.data.views import TestViews
from fd_large.tasks.depth.scores.metrics import (
    NAMES,
    Crop,
    Scored,
    Scores,
    finite_depths,
    image_scores,
)
from fd_large.tasks.depth.scores.pictures import Row, draw_rows


class Outcome(NamedTuple):
    """The result of a test on N images, the same on all ranks.

    Attributes:
        scores: The scores of each image and of the dataset.
        scored: The rule that decides which pixels of an image are scored.
        unread: Number of unreadable images, which are not scored.
    """

    scores: Scores
    scored: Scored
    unread: int

    @property
    def errors(self) -> NDArray[np.float64]:
        """The root mean square error of each image in metres, (N,); NaN for images not scored."""
        return self.scores.of_images[:, NAMES.index("rmse")]

    @property
    def without_depth(self) -> int:
        """Number of readable images that have no pixel to score, and are therefore not scored."""
        return int((~self.scores.scored).sum()) - self.unread


class Model(NamedTuple):
    """The model under test.

    Attributes:
        depths: Maps pixels (B, 3, h, w) uint8, on the device, to depths (B, h, w) in metres, in
            evaluation mode. If the model is sharded, all ranks must call it equally often.
        views: The size at which an image is tested, whole or by windows, and mirrored or not.
        at_once: Largest number of windows in a forward.
    """

    depths: Callable[[Tensor], Tensor]
    views: TestViews
    at_once: int = 1

    @torch.no_grad()
    def predict(self, views: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Predicts the depth of each pixel of an image, (H, W) float32 in metres, on the device.

        Args:
            views: A list of one item, the resized image, (3, h, w) uint8.
            size: Height and width of the result.
        """
        (image,) = views
        depths = self.of_view(image[None].to(distributed.device(), non_blocking=True))
        if depths.shape[-2:] != size:
            depths = F.interpolate(depths[None], size, mode="bilinear", align_corners=False)[0]
        return depths[0]

    def of_view(self, pixels: Tensor) -> Tensor:
        """Predicts the depths (1, h, w), in metres, of a resized image (1, 3, h, w) uint8.

        In a test by windows, the pixels in no square of `TestViews.squares` are predicted in the
        further squares of `TestViews.rest`; where these overlap, their predictions are averaged.
        """
        if not self.views.windows:
            return self._flipped_too(pixels)
        size = (pixels.shape[-2], pixels.shape[-1])
        depths = self.of_squares(pixels)
        if rest := self.views.rest(*size):
            uncovered = mean_of_windows(pixels, self._flipped_too, rest, at_once=self.at_once)
            inside = torch.zeros(size, dtype=torch.bool, device=pixels.device)
            for top, left, bottom, right in self.views.squares(*size):
                inside[top:bottom, left:right] = True
            depths = depths.where(inside, uncovered)
        return depths

    def of_squares(self, pixels: Tensor) -> Tensor:
        """Predicts depths (1, h, w), in metres, only inside the squares of `TestViews.squares`.

        The depths of other pixels are NaN.

        Args:
            pixels: (1, 3, h, w) uint8, a resized image.
        """
        places = self.views.squares(pixels.shape[-2], pixels.shape[-1])
        return mean_of_windows(pixels, self._flipped_too, places, at_once=self.at_once)

    def idle(self) -> None:
        """Runs a forward on a black image.

        Under ZeRO-3 all ranks must run the same number of forwards. A rank that has no image, or
        whose image needs fewer forwards than another rank's, makes up the difference by this call.
        """
        forward_of_nothing(self.depths, self.views.image_size)

    def _flipped_too(self, pixels: Tensor) -> Tensor:
        depths = self.depths(pixels)
        return (depths + self.depths(pixels.flip(-1)).flip(-1)) / 2 if self.views.flip else depths


def evaluate(
    model: Model,
    images: DepthSet,
    *,
    limits: tuple[float, float],
    crop: Crop,
    workers: int,
    between: Callable[[], None] = lambda: None,
) -> Outcome:
    """Tests a model on all images; all ranks must call this function.

    Args:
        model: The model under test.
        images: The test images and their depths.
        limits: Two depths in metres. A pixel is scored if its true depth is strictly between them.
        crop: Name of the part of an image that is scored (`crop_of`).
        workers: Number of loading processes; 0 loads in this process.
        between: Called before each image on every rank; may raise to end the test.
    """
    device, scored = distributed.device(), Scored(limits, crop)
    # Each image is on one rank, so that sums over the ranks change no bit.
    table = torch.zeros(len(images), len(NAMES), dtype=torch.float64)
    pixels = torch.zeros(len(images), dtype=torch.int64)
    unread = torch.zeros((), dtype=torch.int64)
    for item, predicted in predict_all(model, images, workers=workers, between=between):
        unread += bool(item.bad)
        if predicted is None:
            continue
        truth = item.truth.numpy()
        inside = scored.pixels(truth)
        pixels[item.index] = int(inside.sum())
        if pixels[item.index]:
            depths = finite_depths(predicted.float().cpu().numpy(), scored.limits)
            table[item.index] = torch.from_numpy(image_scores(depths[inside], truth[inside]))
    of_images, counts, of_unread = (
        distributed.sum_tensor(part.to(device)).cpu().numpy() for part in (table, pixels, unread)
    )
    of_images[counts == 0] = np.nan
    return Outcome(Scores(of_images, counts), scored, int(of_unread))


def keep(outcome: Outcome, some: DrawnImages | None, images: DepthSet, folder: Path) -> list[Path]:
    """Writes scores.json and redrawn.json (bootstrap RMSEs), and draws plots.

    This function is called on rank 0 alone.

    Args:
        outcome: Result of the test.
        some: The images to draw, from `predict_some`; None draws nothing.
        images: The test images and their depths.
        folder: The folder to write to, which is created if it is missing.

    Returns: the paths of the plots.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SCORES, _plain(outcome, images))
    scored, counts = outcome.scores.scored, redraws(len(images))
    with np.errstate(invalid="ignore"):  # A draw may contain no scored image.
        rmses = counts[:, scored] @ outcome.errors[scored] / counts[:, scored].sum(1)
    rmse = outcome.scores.numbers()["rmse"]
    write_redrawn(folder, images.fingerprint, {"val_rmse": (rmse, rmses)})

    def row(index: int, pixels: Drawn) -> Row:
        return Row(
            images.sample(index)[0].permute(1, 2, 0).numpy(),
            pixels.truth,
            finite_depths(pixels.predicted, outcome.scored.limits),
            outcome.scored.pixels(pixels.truth),
            Path(images[index]).name,
            _in_words(outcome.scores.of_images[index]),
        )

    return draw_some(some, row, draw_rows, folder)


def _in_words(scores: NDArray[np.float64]) -> str:
    of = dict(zip(NAMES, scores, strict=True))
    return f"rmse {of['rmse']:.3f} m, d1 {of['d1']:.3f}"


def _plain(outcome: Outcome, images: DepthSet) -> dict[str, Any]:
    scores = outcome.scores
    return {
        "crop": outcome.scored.crop,
        "limits": list(outcome.scored.limits),
        "images": int(scores.scored.sum()),
        "unread_images": outcome.unread,
        "images_without_depth": outcome.without_depth,
        **{name: finite(value) for name, value in scores.numbers().items()},
        "of_images": {
            images[index]: {
                name: finite(value)
                for name, value in zip(NAMES, scores.of_images[index], strict=True)
            }
            for index in np.flatnonzero(scores.scored).tolist()
        },
    }

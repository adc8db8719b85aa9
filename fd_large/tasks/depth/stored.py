"""The depth that a stored run sees in images of the user's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from fd_large.engine.job import Predicted
from fd_large.files import unlinked
from fd_large.tasks.dense.stored import Seen, predict_files
from fd_large.tasks.depth.scores.evaluation import Model
from fd_large.tasks.depth.scores.pictures import draw_prediction


def predict_images(
    model: Model, images: Sequence[str], folder: Path, *, max_pixels: int
) -> Iterator[Predicted]:
    """Draws the depth of images, and writes it as .npy files and predictions.json.

    Args:
        model: The model, in evaluation.
        images: Paths of image files.
        folder: Folder for what is written.
        max_pixels: Larger images are refused.
    """

    def see(image: Tensor, stem: str) -> Seen:
        size = (image.shape[-2], image.shape[-1])
        views = [view.image(image) for view in model.views.views(*size)]
        depth = model.predict(views, size).cpu().numpy()
        drawn, metres = folder / f"{stem}.png", folder / f"{stem}_depth.npy"
        draw_prediction(image.permute(1, 2, 0).numpy(), depth, drawn)
        np.save(unlinked(metres), depth)
        nearest, median, farthest = (float(x) for x in np.quantile(depth, (0, 0.5, 1)))
        seen = {"depth": metres.name, "nearest": nearest, "median": median, "farthest": farthest}
        return seen, f"{nearest:.2f} to {farthest:.2f} m, median {median:.2f} m", drawn

    return predict_files(see, images, folder, max_pixels=max_pixels)

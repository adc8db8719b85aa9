"""What the segmentation of a stored run sees in images of the user's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from fd_large.engine.job import Predicted
from fd_large.files import unlinked
from fd_large.tasks.dense.stored import Seen, predict_files
from fd_large.tasks.segmentation.data.classes import Classes
from fd_large.tasks.segmentation.scores.evaluation import Model
from fd_large.tasks.segmentation.scores.pictures import draw_prediction

# Classes that are named in the line of an image.
NAMED = 3


def predict_images(
    model: Model, images: Sequence[str], folder: Path, classes: Classes, *, max_pixels: int
) -> Iterator[Predicted]:
    """Draws the classes of images, and writes them as label files and predictions.json.

    Args:
        model: The model, in evaluation.
        images: Paths of image files.
        folder: Folder for what is written.
        classes: Names and colours.
        max_pixels: Larger images are refused.
    """

    def see(image: Tensor, stem: str) -> Seen:
        size = (image.shape[-2], image.shape[-1])
        views = [view.image(image) for view in model.views.views(*size)]
        predicted = model.predict(views, size).cpu().numpy()
        drawn, labels = folder / f"{stem}.png", folder / f"{stem}_labels.png"
        shares = draw_prediction(image.permute(1, 2, 0).numpy(), predicted, classes, drawn)
        small = len(classes.names) <= 256
        Image.fromarray(predicted.astype(np.uint8 if small else np.uint16)).save(unlinked(labels))
        text = ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares[:NAMED])
        return {"labels": labels.name, "classes": dict(shares)}, text, drawn

    return predict_files(see, images, folder, max_pixels=max_pixels)

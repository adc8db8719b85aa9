"""The segmentation of a stored run: its model, and what it sees in images of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fd_large import distributed
from fd_large.atomic_files import out_folder, write_json
from fd_large.checkpoint import stream
from fd_large.checkpoint.read import Reader
from fd_large.data.decode import decode
from fd_large.data.folder import read_image
from fd_large.engine.checkpoint_models import stored_task
from fd_large.engine.job import Predicted
from fd_large.engine.zero.config import computes_in_bfloat16
from fd_large.errors import DataError
from fd_large.tasks.segmentation.data.classes import Classes
from fd_large.tasks.segmentation.scores.evaluation import Model
from fd_large.tasks.segmentation.scores.pictures import draw_prediction
from fd_large.tasks.segmentation.scores.views import Logits
from fd_large.tasks.segmentation.task import Segmentation

# Classes that are named in the line of an image.
NAMED = 3


def segmenter(make: Callable[[], Segmentation], reader: Reader, *, precision: str) -> Logits:
    """Builds the model of a checkpoint, whole on this process's device.

    Args:
        make: Constructs the task.
        reader: A checkpoint of it.
        precision: `engine.precision` of its recipe.
    """
    task = stored_task(make, reader, kind=stream.outcome(reader))
    if computes_in_bfloat16(precision):
        task.bfloat16()
    return task.to(distributed.device()).eval().logits


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
    out_folder(folder)
    seen: dict[str, dict[str, Any]] = {}
    for path in dict.fromkeys(images):
        try:
            image = decode(read_image(path), path, max_pixels=max_pixels)
        except DataError as error:
            yield Predicted(path, problem=str(error))
            continue
        size = (image.shape[-2], image.shape[-1])
        views = [view.image(image) for view in model.views.views(*size)]
        predicted = model.predict(views, size).cpu().numpy()
        # Files with the same name in different folders are kept apart.
        stem = f"{len(seen) + 1}_{Path(path).stem}"
        drawn, labels = folder / f"{stem}.png", folder / f"{stem}_labels.png"
        shares = draw_prediction(image.permute(1, 2, 0).numpy(), predicted, classes, drawn)
        small = len(classes.names) <= 256
        Image.fromarray(predicted.astype(np.uint8 if small else np.uint16)).save(labels)
        seen[path] = {"labels": labels.name, "classes": dict(shares)}
        text = ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares[:NAMED])
        yield Predicted(path, text, drawn)
    write_json(folder / "predictions.json", seen)

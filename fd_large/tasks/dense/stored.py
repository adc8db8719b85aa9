"""The model of a stored run, ready for tests, and a loop over images of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fd_large import distributed
from fd_large.atomic_files import out_folder, write_json
from fd_large.checkpoint import stream
from fd_large.checkpoint.read import Reader
from fd_large.data.decode import decode
from fd_large.data.folder import read_image
from fd_large.engine.checkpoint_models import AnyTask, stored_task
from fd_large.engine.job import Predicted
from fd_large.engine.zero.config import computes_in_bfloat16
from fd_large.errors import DataError

Seen = tuple[Any, str, Path]
"""What predictions.json holds of an image, the same in a few words, and the drawn image."""


def task_to_test(make: Callable[[], AnyTask], reader: Reader, *, precision: str) -> AnyTask:
    """Builds the task of a checkpoint in evaluation, whole on this process's device.

    Args:
        make: Constructs the task.
        reader: A checkpoint of it.
        precision: `engine.precision` of its recipe.
    """
    task = stored_task(make, reader, kind=stream.outcome(reader))
    if computes_in_bfloat16(precision):
        task.bfloat16()
    return task.to(distributed.device()).eval()


def predict_files(
    see: Callable[[Tensor, str], Seen], images: Sequence[str], folder: Path, *, max_pixels: int
) -> Iterator[Predicted]:
    """Predicts image files one by one, and writes predictions.json.

    Args:
        see: Maps pixels (3, H, W) uint8, and the stem of the files to write, to what was seen.
        images: Paths of image files.
        folder: Folder for predictions.json.
        max_pixels: Larger images are refused.
    """
    out_folder(folder)
    seen: dict[str, Any] = {}
    for path in dict.fromkeys(images):
        try:
            image = decode(read_image(path), path, max_pixels=max_pixels)
        except DataError as error:
            yield Predicted(path, problem=str(error))
            continue
        # Files with the same name in different folders are kept apart.
        seen[path], text, drawn = see(image, f"{len(seen) + 1}_{Path(path).stem}")
        yield Predicted(path, text, drawn)
    write_json(folder / "predictions.json", seen)

"""Builds the model of a stored run for tests, and predicts the user's images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fd_large.checkpoint import stream
from fd_large.checkpoint.read import Reader
from fd_large.data.decode import decode
from fd_large.data.folder import read_image
from fd_large.engine.checkpoint_models import AnyTask, stored_task
from fd_large.engine.task import Task
from fd_large.engine.zero import partition
from fd_large.engine.zero.config import computes_in_bfloat16
from fd_large.errors import DataError
from fd_large.files import out_folder, write_json
from fd_large.ranks import distributed, meeting
from fd_large.tasks.dense.evaluation import SCORES, predict_some
from fd_large.tasks.dense.job import DenseJob
from fd_large.tasks.stored_run import Predicted, StoredRun, StoredScores
from fd_large.weights.read import Tensors

Seen = tuple[Any, str, Path]
"""A prediction: its entry in predictions.json, its words, and the path of the drawn image."""


def task_to_test(make: Callable[[], AnyTask], reader: Reader, *, precision: str) -> AnyTask:
    """Builds the task of a checkpoint in evaluation mode, unsharded on this process's device.

    Args:
        make: Constructs the task.
        reader: Reader of the checkpoint.
        precision: The value of `engine.precision` in the checkpoint's recipe, which decides
            between bfloat16 and float32.
    """
    task = stored_task(make, reader, kind=stream.outcome(reader))
    if computes_in_bfloat16(precision):
        task.bfloat16()
    return task.to(distributed.device()).eval()


def head_shapes(make: Callable[[], Task]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a task's parameters and running statistics outside its student.

    Args:
        make: Constructs the task.

    Returns: {name of a tensor in the task: shape}.
    """
    with torch.device("meta"):
        task = make()
    tensors = dict(task.named_parameters()) | partition.running_statistics(task)
    return {n: tuple(t.shape) for n, t in tensors.items() if not n.startswith(stream.STUDENT)}


class HeadTensors(Tensors):
    """The tensors of a checkpoint outside its student, each of which is read on access.

    Args:
        reader: The checkpoint.
        shapes: The result of `head_shapes` for the checkpoint's task.
    """

    def __init__(self, reader: Reader, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__({})
        self._reader, self._shapes = reader, shapes

    def __getitem__(self, name: str) -> Tensor:
        return stream.read(
            self._reader, name, self._shapes[name], kind=stream.outcome(self._reader)
        )

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the tensor `name`, without reading the tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Returns float32, the data type of master and averaged weights, for any name."""
        return torch.float32


def predict_files(
    see: Callable[[Tensor, str], Seen], images: Sequence[str], folder: Path, *, max_pixels: int
) -> Iterator[Predicted]:
    """Predicts image files and yields a result for each; at the end writes predictions.json.

    A path that occurs twice in `images` is predicted once.

    Args:
        see: Predicts and draws an image, from pixels (3, H, W) uint8 and the stem of the drawn
            file's name.
        images: Paths of image files.
        folder: Folder for predictions.json, which is made if it is missing.
        max_pixels: Largest number of pixels of an image. A larger image is not predicted: its
            result has only the reason (`Predicted.problem`), like that of an unreadable image.
    """
    out_folder(folder)
    predictions: dict[str, Any] = {}
    for path in dict.fromkeys(images):
        try:
            image = decode(read_image(path), path, max_pixels=max_pixels)
        except DataError as error:
            yield Predicted(path, problem=str(error))
            continue
        # Files with the same name in different folders are kept apart.
        predictions[path], text, drawn = see(image, f"{len(predictions) + 1}_{Path(path).stem}")
        yield Predicted(path, text, drawn)
    write_json(folder / "predictions.json", predictions)


class StoredDense(StoredRun):
    """A stored run of segmentation or depth, tested with the test settings of its recipe."""

    job: DenseJob

    def tables(self, outcome: Any, images: Any) -> Sequence[Any]:
        """Returns the tables of a test's scores for the terminal.

        Args:
            outcome: The result of `DenseJob.measure`.
            images: The test images.
        """
        raise NotImplementedError

    def score(self, reader: Reader, folder: Path) -> StoredScores:
        """Scores a checkpoint on the test images (`DenseJob.test_images`).

        All ranks must call this method.

        Args:
            reader: A checkpoint of the run.
            folder: Folder of scores and plots.

        Returns: tables and files on rank 0, and nothing on other ranks.
        """
        job, micro = self.job, self.run.batch.micro_batch_size
        job.model_to_test(lambda images: images, 1)
        images = meeting.meet(job.test_images)
        task = distributed.together(lambda: self.task(reader))
        model = job.model_to_test(task.predict, 1 if micro == "auto" else micro)
        out_folder(folder)
        outcome = job.measure(model, images, lambda: None)
        some = predict_some(outcome.errors, model, images)
        if not distributed.is_main():
            return StoredScores((), ())
        drawn = job.keep(outcome, some, images, folder)
        return StoredScores(self.tables(outcome, images), (folder / SCORES, *drawn))

    def task(self, reader: Reader) -> Any:
        """Builds the task of the checkpoint `reader` in evaluation mode.

        The task is unsharded and on this rank's device.
        """
        return task_to_test(self.job.make_task, reader, precision=self.run.engine.precision)

    def without_norm(self) -> str:
        """Returns the model card's sentence on a student without final norm.

        The sentence begins with a space. It is "" if the student has a final norm.
        """
        absent = self.job.stored_student().absent
        return " It had no final norm, which only normalises here." if absent else ""

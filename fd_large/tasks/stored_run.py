"""The interface of stored runs for commands: export, scores, predictions, heads, losses.

This is the second of a task's three faces (`fd_large/recipes/task_kind.py`), used by commands but
not by the engine. Tasks without a subclass use this one, which only exports their student.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from fd_large.backbones.exports import Export
from fd_large.checkpoint.read import Reader
from fd_large.checkpoint.stream import Shape
from fd_large.engine.job import TrainingJob
from fd_large.engine.task import Task
from fd_large.errors import ConfigError
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.export import export_of
from fd_large.weights.libraries import LIBRARIES, To
from fd_large.weights.model_card import LOSSES, Learned


class StoredScores(NamedTuple):
    """The scores of a stored run.

    Attributes:
        tables: Tables for the terminal.
        files: Files that were written.
    """

    tables: Sequence[Any]
    files: Sequence[Path]


class Predicted(NamedTuple):
    """A stored run's prediction for an image.

    Attributes:
        path: The image file.
        text: The prediction in a few words.
        drawn: Path of the drawn image; None if the image file could not be read.
        problem: Reason that the image could not be read, or "".
    """

    path: str
    text: str = ""
    drawn: Path | None = None
    problem: str = ""


class StoredRun:
    """A run in its folder, with export, scores, diagnosis and predictions for commands.

    Args:
        job: The job of its recipe; nothing is built.

    Attributes:
        job: The job.
        run: The recipe.
    """

    loss_name: ClassVar[str] = ""
    """Name of the run's loss in `diagnose` (`losses_on`); empty if the loss needs more than
    images, with or without a class each."""

    def __init__(self, job: TrainingJob) -> None:
        self.job, self.run = job, job.run

    # --- export ---

    def exported_into(self, architecture: FamilyArchitecture, to: To) -> Export | None:
        """Returns the export of the student, or of the whole task, to a library's files.

        Args:
            architecture: The student, with the image size of the export.
            to: The library.

        Returns: None for a graph, which takes any model.
        Raises: ConfigError: if the library lacks this model.
        """
        if LIBRARIES[to].heads:
            able = ", ".join(
                f"--to {form}" for form, library in LIBRARIES.items() if not library.heads
            )
            raise ConfigError(
                f"export: --to {to}: holds a model with its heads; got a run of the task "
                f"{self.run.task.name}, expected a task whose heads it has. Use one of {able}."
            )
        student = self.run.student
        pads = student.size_rule == "pad"
        return export_of(architecture, to, pads=pads, window_rule=student.window_rule)

    def exported_beside(
        self, reader: Reader, student: Mapping[str, Shape], to: To
    ) -> Mapping[str, Shape]:
        """Returns the task's tensors that are exported beside the student.

        Args:
            reader: The checkpoint that is exported.
            student: Shapes of the student's tensors by their own names.
            to: The library.

        Returns: their shapes, by their names in the checkpoint.
        Raises: CheckpointError: if the checkpoint is not of this recipe's models.
        """
        return {}

    def learned(self, manifest: Mapping[str, Any], to: To) -> Learned:
        """Returns the model card's text on the task.

        Args:
            manifest: The checkpoint's manifest.
            to: The library.
        """
        metrics = {
            name.replace("/", "_"): label for name, label in self.job.metrics.items() if "/" in name
        }
        return Learned(
            title=f"the backbone of a {self.run.task.name} run",
            intro="An image backbone; the task's own heads are left out.",
            tag="image-feature-extraction",
            metrics=LOSSES | metrics,
        )

    # --- heads that guess models beside the student ---

    def heads(self, reader: Reader) -> Mapping[str, nn.Module]:
        """Returns heads that predict other models' outputs from the student's, by name.

        Each maps the student and its normalised pixels to a FeatureMap.

        Args:
            reader: A checkpoint of the run.
        """
        return {}

    def export_heads(self, reader: Reader, folder: Path, shard_size: int) -> None:
        """Writes the `heads` next to an exported student, if any.

        Args:
            reader: The checkpoint that is exported.
            folder: New folder, which gets a config.json that names the task.
            shard_size: Most bytes of a file of tensors.
        """

    @staticmethod
    def exported_heads(folder: Path) -> Mapping[str, nn.Module]:
        """Returns the heads that `export_heads` wrote, by name.

        Raises: WeightsError: if the folder is damaged.
        """
        return {}

    # --- the whole task ---

    def score(self, reader: Reader, folder: Path) -> StoredScores:
        """Scores the run's model on its test images; a collective.

        Args:
            reader: A checkpoint of the run.
            folder: Folder of the results, made if it is missing (`out_folder`); all ranks see it.

        Returns: tables and files, on rank 0.
        Raises: ConfigError: if the task does not score stored runs.
        """
        raise ConfigError(
            f"evaluate: the task {self.run.task.name} does not score a run by itself; got "
            f"{self.run.name}, expected a run of a task that does. Set --task knn."
        )

    def predict(
        self, reader: Reader, images: Sequence[str], folder: Path, *, least_score: float
    ) -> Iterator[Predicted]:
        """Draws the model's predictions for images, and writes predictions.json.

        Args:
            reader: A checkpoint of the run.
            images: Paths of image files.
            folder: Folder of the results, made where it is missing (`out_folder`).
            least_score: Least score of an object that is drawn and written.

        Raises: ConfigError: if the task predicts nothing that can be drawn.
        """
        raise ConfigError(
            f"predict: the task {self.run.task.name} has no predictions to draw; got "
            f"{self.run.name}, expected a run of detection, segmentation or depth. python -m "
            "fd_large recipes lists them."
        )

    def classes(self) -> tuple[str, ...] | None:
        """Returns the names of the labelled classes that the loss needs, or None.

        Raises: FDError: if the images that show them are gone.
        """
        return None

    def losses_on(
        self, task: Task, images: Tensor, labels: Tensor | None
    ) -> Callable[[], Mapping[str, float]]:
        """Returns a function that computes the loss and its terms on given images.

        It uses the weights at the time of the call; the frozen models run only once, here.

        Args:
            task: The job's, in evaluation mode.
            images: (B, 3, S, S) uint8, on the device.
            labels: (B,) int64, indices into `classes`, on the device; None without labels.

        Returns: a function that returns {words: value}, `loss_name` first.
        """
        prepared = task.prepare(images, labels, None)
        return lambda: {self.loss_name: task(**prepared)[0].item()}

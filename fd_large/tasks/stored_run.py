"""The interface of stored runs for commands: export, scores, predictions, heads, losses.

`StoredRun` is the second of the three classes of a task (`fd_large/recipes/task_kind.py`), used by
commands but not by the engine. A task without a subclass of its own can only export its student.
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
        files: Paths of the files that were written.
    """

    tables: Sequence[Any]
    files: Sequence[Path]


class Predicted(NamedTuple):
    """A model's prediction for an image.

    Attributes:
        path: The image file.
        text: The prediction in a few words.
        drawn: Path of the drawn image; None if the image file could not be read.
        problem: Reason that the image could not be read; "" if it could be read.
    """

    path: str
    text: str = ""
    drawn: Path | None = None
    problem: str = ""


class StoredRun:
    """What commands can do with a task's stored run: export, scores, diagnosis, predictions.

    Args:
        job: The job of the run's recipe. The constructor builds no model.

    Attributes:
        job: The job of the run's recipe.
        run: The run's recipe.
    """

    loss_name: ClassVar[str] = ""
    """Name of the loss in the command `diagnose` (`losses_on`); "" if `losses_on` cannot compute
    the loss, since it needs more than images and the class of each image."""

    def __init__(self, job: TrainingJob) -> None:
        self.job, self.run = job, job.run

    # --- export ---

    def exported_into(self, architecture: FamilyArchitecture, to: To) -> Export | None:
        """Describes an export: of the student alone, or together with the heads of its task.

        Args:
            architecture: The student's architecture, with the image size of the export.
            to: The library or format of the export, a value of the flag `--to`.

        Returns: how tensors and configuration are translated for the library. None if the format is
            a graph, which can hold any model.
        Raises: ConfigError: if the library lacks this model.
        """
        if LIBRARIES[to].heads:
            able = ", ".join(
                f"--to {form}" for form, library in LIBRARIES.items() if not library.heads
            )
            raise ConfigError(
                f"export: --to {to}: this format holds a model with its heads; got a run of the "
                f"task {self.run.task.name}, expected a task whose heads the format can hold. Use "
                f"one of {able}."
            )
        student = self.run.student
        pads = student.size_rule == "pad"
        return export_of(architecture, to, pads=pads, window_rule=student.window_rule)

    def exported_beside(
        self, reader: Reader, student: Mapping[str, Shape], to: To
    ) -> Mapping[str, Shape]:
        """Returns the shapes of the task's tensors that are exported together with the student.

        Args:
            reader: The checkpoint that is exported.
            student: {name in the student: shape} of the student's tensors.
            to: The library or format of the export, a value of the flag `--to`.

        Returns: {name in the checkpoint: shape}.
        Raises: CheckpointError: if the checkpoint has other models than this run's recipe.
        """
        return {}

    def learned(self, manifest: Mapping[str, Any], to: To) -> Learned:
        """Returns what the model card of an export says about the task: title, text and metrics.

        Args:
            manifest: The manifest of the exported checkpoint.
            to: The library or format of the export, a value of the flag `--to`.
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

    # --- heads that predict other models' outputs ---

    def heads(self, reader: Reader) -> Mapping[str, nn.Module]:
        """Returns {name: head}; a head predicts another model's feature map from the student's map.

        Each head is called with the student and the student's normalised pixels, and returns a
        FeatureMap.

        Args:
            reader: A checkpoint of the run.
        """
        return {}

    def export_heads(self, reader: Reader, folder: Path, shard_size: int) -> None:
        """Writes the result of `heads` into a folder; the default writes nothing.

        Args:
            reader: The checkpoint that is exported.
            folder: New folder, which gets a config.json that names the task.
            shard_size: Largest size of a file of tensors, in bytes.
        """

    @staticmethod
    def exported_heads(folder: Path) -> Mapping[str, nn.Module]:
        """Reads the heads that `export_heads` wrote, and returns them as {name: head}.

        Args:
            folder: The folder that `export_heads` filled.

        Raises: WeightsError: if the folder is damaged.
        """
        return {}

    # --- the whole task ---

    def score(self, reader: Reader, folder: Path) -> StoredScores:
        """Scores the run's model on the run's test images; all ranks must call this method.

        Args:
            reader: A checkpoint of the run.
            folder: Folder of the results, which all ranks see and which is made if it is missing
                (`out_folder`).

        Returns: the scores on rank 0. The result of other ranks is not used.
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
            folder: Folder of the results, which is made if it is missing (`out_folder`).
            least_score: Smallest score of an object that is drawn and written; used only by tasks
                whose predictions have scores.

        Raises: ConfigError: if the task predicts nothing that can be drawn.
        """
        raise ConfigError(
            f"predict: the task {self.run.task.name} has no predictions to draw; got "
            f"{self.run.name}, expected a run of detection, segmentation or depth. python -m "
            "fd_large recipes lists their recipes."
        )

    def classes(self) -> tuple[str, ...] | None:
        """Returns the names of the task's classes, or None if the task's loss needs no labels.

        Raises: FDError: if the training images, from whose folders the names come, are missing.
        """
        return None

    def losses_on(
        self, task: Task, images: Tensor, labels: Tensor | None
    ) -> Callable[[], Mapping[str, float]]:
        """Returns a function that computes the loss and its terms on given images.

        Each call of this function uses the weights that the task has at the time of the call. The
        frozen models run only once, when the function is made.

        Args:
            task: The job's task, in evaluation mode.
            images: (B, 3, S, S) uint8, on the device.
            labels: (B,) int64, indices into the result of `classes`, on the device; None if the
                loss needs no labels.

        Returns: a function without arguments that returns {name: value}. The first name is
            `loss_name`.
        """
        prepared = task.prepare(images, labels, None)
        return lambda: {self.loss_name: task(**prepared)[0].item()}

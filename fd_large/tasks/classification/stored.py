"""What commands do with a stored fine-tuning or linear probe: losses and model card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from fd_large.engine.task import Task
from fd_large.tasks.classification.job import ClassificationJob
from fd_large.tasks.classification.scores import averaged
from fd_large.tasks.stored_run import StoredRun
from fd_large.weights.libraries import To
from fd_large.weights.model_card import Learned
from fd_large.weights.origin import without_folders


class StoredClassification(StoredRun):
    """The stored run of a fine-tuning or of a linear probe.

    A linear probe has no student that could be exported.
    """

    job: ClassificationJob
    loss_name = "cross-entropy"

    def classes(self) -> tuple[str, ...]:
        """Returns the names of the classes of the training images."""
        return self.job.classes()

    def losses_on(
        self, task: Task, images: Tensor, labels: Tensor | None
    ) -> Callable[[], Mapping[str, float]]:
        """Returns a function that computes the loss, and the accuracy in per cent, on given images.

        Each call of this function uses the weights that the task has at the time of the call.

        Args:
            task: The job's task, in evaluation mode.
            images: (B, 3, S, S) uint8, on the device.
            labels: (B,) int64, indices into the result of `classes`, on the device.

        Returns: a function without arguments that returns {`loss_name`: the mean loss,
            "accuracy (%)": the top-1 accuracy}.
        """
        prepared = task.prepare(images, labels, None)

        def losses() -> dict[str, float]:
            averages = averaged(task(**prepared)[1])
            return {self.loss_name: averages["loss"], "accuracy (%)": averages["top1"]}

        return losses

    def learned(self, manifest: Mapping[str, Any], to: To) -> Learned:
        """Returns what the model card of a fine-tuned student says about its training.

        Args:
            manifest: The manifest of the exported checkpoint.
            to: The library or format of the export, a value of the flag `--to`.
        """
        name = without_folders(self.run.data.root)
        absent = self.job.stored_student().absent
        norm = " Its final norm only normalises: the classifier had one of its own."
        return replace(
            super().learned(manifest, to),
            title=f"fine-tuned on {name}",
            intro="An image backbone, trained as a whole to name the class of an image; the "
            f"classifier is left out.{norm if absent else ''}",
            tag="image-classification-backbone",
        )

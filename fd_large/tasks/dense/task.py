"""The base class of tasks with a target for each pixel, whose student may be frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.engine.task import Task
from fd_large.tasks.dense.pixels import normalised


class DenseTask(Task):
    """A student, and a head with batch norms that predicts the class or depth of each pixel.

    Args:
        student: A backbone of `fd_large.backbones`.
        frozen: Whether only the head is trained.
        statistics: Mean and deviation that normalise the student's pixels.
    """

    def __init__(
        self, student: nn.Module, *, frozen: bool = False, statistics: Statistics = IMAGENET
    ) -> None:
        super().__init__(student)
        self.frozen, self.statistics = frozen, statistics

    def pixels(self, images: Tensor) -> Tensor:
        """Returns images (B, 3, H, W) uint8 without padding as normalised float32 pixels."""
        sizes = torch.tensor([images.shape[-2:]] * len(images), device=images.device)
        return normalised(images, sizes, self.statistics)

    def predict(self, images: Tensor) -> Tensor:
        """Returns the predictions of images, the result of `forward` without a target.

        Args:
            images: (B, 3, H, W) uint8 without padding, on the device.
        """
        return self(pixels=self.pixels(images))

    def layer_scale(self, name: str, decay: float) -> float:
        """Returns the factor of a parameter's learning rate under layer-wise decay.

        The factor is 1 for parameters outside the student, and 0 for those of a frozen student.

        Args:
            name: The parameter's name in this Module.
            decay: Factor from each layer of the student to the layer below it.
        """
        if self.frozen and name.startswith("student."):
            return 0.0
        return super().layer_scale(name, decay)

    def student_norms(self) -> list[Any]:
        """Returns the student's batch norms that normalise by statistics of the current batch.

        A frozen student has no such norms, since it uses the statistics loaded with its weights.
        """
        return [] if self.frozen else super().student_norms()

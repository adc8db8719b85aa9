"""The base of tasks with a target for each pixel, whose student may be frozen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.engine.task import Task
from fd_large.tasks.dense.pixels import normalised


class DenseTask(Task):
    """A head with batch norms on a student, which may be frozen.

    Args:
        student: A backbone of `fd_large.backbones`.
        frozen: Whether the student is frozen.
        statistics: The student's normalisation.
    """

    def __init__(
        self, student: nn.Module, *, frozen: bool = False, statistics: Statistics = IMAGENET
    ) -> None:
        super().__init__(student)
        self.frozen, self.statistics = frozen, statistics

    def pixels(self, images: Tensor) -> Tensor:
        """Normalises images (B, 3, H, W) uint8 of one size to float32."""
        sizes = torch.tensor([images.shape[-2:]] * len(images), device=images.device)
        return normalised(images, sizes, self.statistics)

    def predict(self, images: Tensor) -> Tensor:
        """Returns `forward` without a target, for images (B, 3, H, W) uint8 of one size.

        Args:
            images: On the device.
        """
        return self(pixels=self.pixels(images))

    def layer_scale(self, name: str, decay: float) -> float:
        """Returns the factor of a parameter's learning rate, 0 if it is a frozen student's."""
        if self.frozen and name.startswith("student."):
            return 0.0
        return super().layer_scale(name, decay)

    def student_norms(self) -> list[Any]:
        """Returns the student's batch norms; none if frozen, since it uses loaded statistics."""
        return [] if self.frozen else super().student_norms()

"""Fine-tuning as a task: the whole model learns to name the class of an image.

What is classified is the mean of the patch tokens (`classification/mean_token.py`). Every block has
its own copy of a position bias that blocks shared before (the families' `published.py` make the
copies).

Source: the official fine-tuning code (models/vision_transformer.py, main_finetune.py) of
SwinTransformer/Feature-Distillation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.initialization import NORMAL
from fd_large.backbones.layers import Linear
from fd_large.backbones.statistics import Statistics, normalise
from fd_large.engine.heads import make_head
from fd_large.engine.task import Task
from fd_large.tasks.classification.mean_token import has_norm_instead, mean_token, norm_of_mean
from fd_large.tasks.classification.scores import summed

# Published for ViT: predictions start all alike.
HEAD_SCALE = 1e-3
# The field of the recipe that names the classifier.
HEAD = "task.finetune.head"


class FineTuning(Task):
    """A backbone and a classifier of its mean token, by default linear.

    Args:
        student: A backbone of `fd_large.backbones`.
        num_classes: K.
        statistics: The normalisation of its images, in training and in tests.
        head: Name of the classifier of the mean token: "linear", or one of the user's own, a
            function or Module class of (width, num_classes).
    """

    def __init__(
        self,
        student: nn.Module,
        num_classes: int,
        *,
        statistics: Statistics,
        head: str = "linear",
    ) -> None:
        super().__init__(student)
        self.statistics = statistics
        self.fc_norm = norm_of_mean(student)
        draw = NORMAL.divided(1 / HEAD_SCALE) if has_norm_instead(student) else NORMAL
        heads = {"linear": partial(Linear, draw=draw)}
        self.head = make_head(head, student.width, num_classes, built_in=heads, where=HEAD)

    def prepare(self, images: Tensor, targets: Any, keep: Tensor | None) -> dict[str, Any]:
        """Returns the pixels, normalised if they are still uint8, and the targets."""
        pixels = images if images.is_floating_point() else normalise(images, self.statistics)
        return {"pixels": pixels, "targets": targets, "keep": keep}

    def forward(
        self, *, pixels: Tensor, targets: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the cross-entropy and, in evaluation, sums over the images and `predicted`, (B,).

        Args:
            pixels: (B, 3, H, W) float32, normalised.
            targets: (B, K) float32, distributions; in evaluation (B,) int64, labels, where
                images with `NO_LABEL` are not counted.
            keep: (num_sites, B) bool, or None.
        """
        logits = self.logits(pixels, keep)
        if self.training:
            return -(targets * F.log_softmax(logits, -1)).sum(-1).mean(), {}
        return summed(logits, targets)

    def logits(self, pixels: Tensor, keep: Tensor | None) -> Tensor:
        """Returns (B, K) float32."""
        dtype = next(self.student.parameters()).dtype
        mean = mean_token(self.student(pixels.to(dtype), keep), self.fc_norm)
        return self.head(mean.to(dtype)).float()

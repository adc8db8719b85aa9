"""Fine-tuning as a task: the whole model learns to name the class of an image.

A ViT classifies the mean of its patch tokens, normalised by a norm of its own; the final norm that
distillation trained is discarded. A Swin model keeps its norm. The map of a model of timm may be
raw: its mean is normalised too, and what norms it has stay. Every block has its own copy of a
position bias that blocks shared before (the families' `published.py` make the copies).

Source: the official fine-tuning code (models/vision_transformer.py, main_finetune.py) of
SwinTransformer/Feature-Distillation.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.initialization import NORMAL
from fd_large.backbones.layers import LayerNorm, Linear
from fd_large.backbones.statistics import Statistics, normalise
from fd_large.data.centre_crops import NO_LABEL
from fd_large.engine.heads import make_head
from fd_large.engine.task import Task
from fd_large.recipes.family import FamilyArchitecture

NORM_EPS = 1e-6
# Published for ViT: predictions start all alike.
HEAD_SCALE = 1e-3
# The field of the recipe that names the classifier.
HEAD = "task.finetune.head"
# The student's final norm, which the task discards where it has a norm of its own instead, and the
# values that a whole student has in its place.
DISCARDED = {"norm.weight": 1.0, "norm.bias": 0.0}


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
        self.fc_norm: LayerNorm | None = None
        draw = NORMAL
        kind = getattr(student, "mean_norm", FamilyArchitecture.mean_norm)
        if kind == "instead":
            self.fc_norm = LayerNorm(student.width, student.norm.eps)
            student.norm = nn.Identity()
            draw = NORMAL.divided(1 / HEAD_SCALE)
        elif kind == "also":
            self.fc_norm = LayerNorm(student.width, NORM_EPS)
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
        counted = targets != NO_LABEL
        losses = F.cross_entropy(logits, targets, ignore_index=NO_LABEL, reduction="none")
        ranked = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
        best = ranked == targets[:, None]
        sums = {
            "loss": losses.sum(),
            "top1": best[:, 0].sum(),
            "top5": best.sum(),
            "pictures": counted.sum(),
        }
        found = {name: value.double() for name, value in sums.items()}
        return losses.sum() / counted.sum().clamp(min=1), found | {"predicted": ranked[:, 0]}

    def logits(self, pixels: Tensor, keep: Tensor | None) -> Tensor:
        """Returns (B, K) float32."""
        dtype = next(self.student.parameters()).dtype
        features = self.student(pixels.to(dtype), keep)
        mean = features.tokens[:, features.num_prefix_tokens :].float().mean(1)  # (B, C)
        if self.fc_norm is not None:
            mean = self.fc_norm(mean)
        return self.head(mean.to(dtype)).float()


def counted(sums: dict[str, Tensor]) -> dict[str, float]:
    """Returns the mean loss and percentages of sums over all images."""
    images = max(float(sums["pictures"]), 1.0)
    return {
        "loss": float(sums["loss"]) / images,
        "top1": 100 * float(sums["top1"]) / images,
        "top5": 100 * float(sums["top5"]) / images,
    }

"""Feature distillation as a task: a loss between projected student and normalised teacher map.

By default smooth L1 between the linear projection and the whitened map. Source: Wei et al., arXiv
2205.14141; constants as in the official code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import IMAGENET, Statistics, normalise
from fd_large.engine.heads import make_head
from fd_large.engine.task import Task
from fd_large.tasks.distillation.alignment import align
from fd_large.tasks.distillation.heads import HEADS, WHERE
from fd_large.tasks.distillation.losses import make_loss
from fd_large.tasks.distillation.normalisers import WHITENING, make_normaliser


class Distillation(Task):
    """A student, its projection to the teacher's width, and the loss between the two maps.

    Args:
        student: A backbone of `fd_large.backbones`.
        teacher: Any callable that maps uint8 images to a FeatureMap without gradient. It is not a
            submodule, so that its parameters are in no optimiser and no checkpoint.
        teacher_width: Number of channels of the teacher's map.
        loss: Name of the loss (losses.py).
        normaliser: Name of what is done to the teacher's tokens (normalisers.py).
        head: Name of what projects the student's tokens to the teacher's width (heads.py).
        beta: Difference above which the loss is linear rather than quadratic, in whitened units.
        whitening_eps: Constant added to the variance of a teacher's token.
        target_statistics: File of statistics of the teacher's channels, for a normaliser that
            needs them.
        interpolation: How the teacher's map is resized to the student's grid: "bilinear"; "none"
            refuses different grids.
        statistics: The student's normalisation; the paper uses ImageNet's for every student.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Callable[[Tensor], FeatureMap],
        teacher_width: int,
        *,
        loss: str = "smooth_l1",
        normaliser: str = WHITENING,
        head: str = "linear",
        beta: float = 2.0,
        whitening_eps: float = 1e-5,
        target_statistics: str = "",
        interpolation: str = "none",
        statistics: Statistics = IMAGENET,
    ) -> None:
        super().__init__(student)
        self.projection = make_head(head, student.width, teacher_width, built_in=HEADS, where=WHERE)
        self.loss = make_loss(loss, beta=beta)
        self.normalise = make_normaliser(
            normaliser, eps=whitening_eps, statistics=target_statistics
        )
        self.whitening_eps = whitening_eps if normaliser == WHITENING else None
        self.interpolation, self.statistics = interpolation, statistics
        # In a tuple, so that nn.Module does not register a teacher that is a Module.
        self._teacher = (teacher,)

    def prepare(self, images: Tensor, targets: Any, keep: Tensor | None) -> dict[str, Any]:
        """Returns the student's pixels, the drop-path draws and the teacher's map."""
        del targets  # Images are all that is needed.
        with torch.no_grad():
            return {
                "pixels": normalise(images, self.statistics),
                "keep": keep,
                "target": self._teacher[0](images),
            }

    def forward(
        self, *, pixels: Tensor, keep: Tensor | None, target: FeatureMap
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and, in evaluation, the mean cosine of projected and normalised tokens.

        Args:
            pixels: (B, 3, H, W) float32, normalised for the student.
            keep: (num_sites, B) bool, or None for no drop path.
            target: The teacher's map, any floating-point dtype.
        """
        dtype = next(self.student.parameters()).dtype
        student_map = self.student(pixels.to(dtype), keep)
        tokens, target_tokens = align(student_map, target, interpolation=self.interpolation)
        projected = self.projection(tokens.to(dtype))
        loss = None
        if self.whitening_eps is not None:
            loss = self.loss.fused(projected, target_tokens, self.whitening_eps)
        if loss is None:
            wanted = self.normalise(target_tokens.detach())
            loss = self.loss(projected.to(wanted.dtype), wanted)
        metrics: dict[str, Tensor] = {}
        if not self.training:
            wanted = self.normalise(target_tokens)
            metrics["cosine"] = F.cosine_similarity(projected.float(), wanted, dim=-1).mean()
        return loss, metrics

    def reference(self, *, pixels: Tensor, keep: Tensor | None, target: FeatureMap) -> Tensor:
        """Returns the normalised target tokens of `forward`, (B, N, Ct) float32."""
        grid, prefix = self.student.grid(*pixels.shape[-2:]), self.student.num_prefix_tokens
        shape_only = pixels.new_empty(len(pixels), prefix + grid[0] * grid[1], 0)
        _, tokens = align(
            FeatureMap(shape_only, grid, prefix), target, interpolation=self.interpolation
        )
        return self.normalise(tokens)

    def models(self) -> dict[str, nn.Module]:
        """Returns the teacher and this task; the teacher first, as it runs first."""
        teacher = getattr(self._teacher[0], "module", self._teacher[0])
        frozen = {"teacher.": teacher} if isinstance(teacher, nn.Module) else {}
        return {**frozen, "": self}

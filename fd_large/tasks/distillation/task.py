"""Feature distillation as a task: what a student learns of one or of several frozen teachers.

The loss is a sum over targets (target.py), by weight. By default there is one: smooth L1 between
the linear projection of the student's map and the whitened map of a teacher. Source: Wei et al.,
arXiv 2205.14141; constants as in the official code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import IMAGENET, Statistics, normalise
from fd_large.engine.task import Task
from fd_large.tasks.distillation.heads.map_head import BesideLoss, with_blocks
from fd_large.tasks.distillation.target import Target

Teachers = Mapping[str, Callable[[Tensor], FeatureMap]]


class Distillation(Task):
    """A student, a head for each target, and the sum of the losses.

    The head of an only teacher's map is `projection`; those of several teachers are
    `heads.NAME.KIND`.

    Args:
        student: A backbone of `fd_large.backbones`.
        teachers: Callables that map uint8 images to a FeatureMap without gradient, by name; "" is
            the name of an only one. They are not submodules, so that their parameters are in no
            optimiser and no checkpoint.
        targets: What is learnt of them.
        statistics: The student's normalisation; the paper uses ImageNet's for every student.

    Attributes:
        targets: As given.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Teachers,
        targets: Sequence[Target],
        *,
        statistics: Statistics = IMAGENET,
    ) -> None:
        super().__init__(student)
        self.targets, self.statistics = tuple(targets), statistics
        # In a plain dict, so that nn.Module does not register teachers that are Modules.
        self._teachers = dict(teachers)
        heads: dict[str, nn.ModuleDict] = {}
        for target in self.targets:
            if target.label:
                heads.setdefault(target.teacher, nn.ModuleDict())[target.kind] = target.head
            else:
                self.projection = target.head
        if heads:
            self.heads = nn.ModuleDict(heads)

    def learnt(self, images: Tensor, targets: Any) -> Mapping[str, FeatureMap]:
        """Returns the teachers' maps of the images by name; the targets may give them.

        The teachers run one after another: of a sharded one a layer is gathered at a time.
        """
        given = targets if isinstance(targets, Mapping) else {}
        with torch.no_grad():
            return {
                name: given[name] if name in given else teacher(images)
                for name, teacher in self._teachers.items()
            }

    def prepare(self, images: Tensor, targets: Any, keep: Tensor | None) -> dict[str, Any]:
        """Returns the student's pixels, the drop-path draws and the teachers' maps."""
        with torch.no_grad():
            return {
                "pixels": normalise(images, self.statistics),
                "keep": keep,
                "maps": self.learnt(images, targets),
            }

    def forward(
        self, *, pixels: Tensor, keep: Tensor | None, maps: Mapping[str, FeatureMap]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and, in evaluation, how near the student is to each target.

        That is the mean cosine of projected and normalised tokens. Of several targets each has
        its loss and its cosine, and `cosine` is their mean.

        Args:
            pixels: (B, 3, H, W) float32, normalised for the student.
            keep: (num_sites, B) bool, or None for no drop path.
            maps: The teachers' maps by name, any floating-point dtype.
        """
        dtype = next(self.student.parameters()).dtype
        if any(target.reads_blocks for target in self.targets):
            student_map, blocks = with_blocks(self.student, pixels.to(dtype), keep)
        else:
            student_map, blocks = self.student(pixels.to(dtype), keep), ()
        # The residual stream may have another data type than the heads.
        student_map, *blocks = (
            map_._replace(tokens=map_.tokens.to(dtype)) for map_ in (student_map, *blocks)
        )
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        cosines: list[Tensor] = []
        for target in self.targets:
            projected, wanted = target.compared(student_map, blocks, maps[target.teacher])
            loss = target.value(projected, wanted)
            losses.append(target.weight * loss)
            if not self.training:
                cosines.append(target.cosine(projected, wanted))
                if target.label:
                    metrics[f"{target.label}_loss"] = loss.detach()
                    metrics[f"{target.label}_cosine"] = cosines[-1]
        if cosines:
            metrics["cosine"] = torch.stack(cosines).mean()
        total = reduce(add, losses)
        if blocks:
            total = BesideLoss.apply(total, student_map.tokens)
        return total, metrics

    def references(
        self, *, pixels: Tensor, keep: Tensor | None, maps: Mapping[str, FeatureMap]
    ) -> list[Tensor]:
        """Returns the normalised target tokens of `forward`, (B, N, Ct) float32 for each target."""
        student = FeatureMap(
            pixels, self.student.grid(*pixels.shape[-2:]), self.student.num_prefix_tokens
        )
        return [target.wanted(student, maps[target.teacher]) for target in self.targets]

    def models(self) -> dict[str, nn.Module]:
        """Returns the teachers and this task; the teachers first, as they run first."""
        frozen = {}
        for name, teacher in self._teachers.items():
            model = getattr(teacher, "module", teacher)
            if isinstance(model, nn.Module):
                frozen[f"teachers.{name}." if name else "teacher."] = model
        return {**frozen, "": self}

"""Targets of a recipe, each a teacher's map or summary on a common grid with the student's.

They extend the small `Target` of task.py by names, kinds, prefix tokens and grids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.engine.parts import Part
from fd_large.tasks.distillation.alignment import Grid, align, common_grid
from fd_large.tasks.distillation.heads.map_head import MapHead
from fd_large.tasks.distillation.losses import Loss
from fd_large.tasks.distillation.normalisers import Normaliser
from fd_large.tasks.distillation.section import MAP, SUMMARY, label
from fd_large.tasks.distillation.task import Distillation, Maps, Seen, Target


class NamedTarget(Target):
    """A head on the student's tokens, and the loss between them and a teacher's map or summary.

    Loss and normaliser may have a state that training updates: `state(label)` returns it by its
    name in checkpoints, and `part(target)` returns the part of a step that updates it.

    Args:
        head: The Module from (B, N, width) to (B, N, teacher_width), or a `MapHead`.
        teacher, weight: As `Target`.
        normalise: From tokens (..., teacher_width) to the same in float32.
        loss: The loss.
        kind: "map" or "summary".
        fused_eps: Constant added to a token's variance, if a kernel may fuse whitening and loss;
            else None.
        interpolation: Interpolation between different grids (alignment.py); "none" refuses
            different grids.
        with_prefix: Whether the map's prefix tokens (CLS) are learnt with it.
        projection: (teacher_width, channels of the teacher's map), by which the teacher's summary
            becomes its embedding; None: the summary itself is learnt.

    Attributes:
        reads_blocks: Whether the head reads the maps of the student's blocks.
    """

    loss: Loss

    def __init__(
        self,
        head: nn.Module,
        *,
        teacher: str,
        normalise: Normaliser,
        loss: Loss,
        weight: float = 1.0,
        kind: str = MAP,
        fused_eps: float | None = None,
        interpolation: str = "none",
        with_prefix: bool = True,
        projection: Tensor | None = None,
    ) -> None:
        name = label(teacher, kind)
        super().__init__(
            head,
            teacher=teacher,
            normalise=normalise,
            loss=loss,
            weight=weight,
            label=name,
            path=f"heads.{teacher}.{kind}" if name else "projection",
        )
        self.kind, self.reads_blocks = kind, reads_blocks(head)
        self._eps, self._projection = fused_eps, projection
        self._interpolation, self._with_prefix = interpolation, with_prefix

    @property
    def stateful(self) -> list[Any]:
        """The normaliser and the loss, if they have a state."""
        return [each for each in (self.normalise, self.loss) if hasattr(each, "part")]

    def modules(self) -> dict[str, nn.Module]:
        """Returns head and state by their names in checkpoints."""
        modules = {self.path: self.head}
        for each in self.stateful:
            modules |= each.state(self.label)
        return modules

    def parts(self) -> tuple[Part, ...]:
        """Returns the parts that update the state."""
        return tuple(each.part(self) for each in self.stateful)

    def compared(self, student_maps: Seen, teacher: FeatureMap) -> tuple[Tensor, Tensor]:
        """Returns the tokens to compare, (B, N, Ct), of student (after the head) and teacher.

        N is 1 for a summary.

        Args:
            student_maps: The student's maps, in the data type of the head.
            teacher: The teacher's map, any floating-point dtype.

        Raises: ShapeError: if the grids of two maps differ and are not to be interpolated.
        """
        if self.kind == SUMMARY:
            teacher = as_map(self._summary_of(teacher))
        student = guess(
            self.head,
            student_maps.map,
            student_maps.blocks,
            kind=self.kind,
            with_prefix=self._with_prefix,
            num_prefix_tokens=teacher.num_prefix_tokens,
        )
        student, teacher = self._aligned(student, teacher)
        return student.tokens, teacher.tokens

    def tokens_of(self, task: Distillation, *, pixels: Tensor, maps: Maps, **_: Any) -> Tensor:
        """Returns the teacher's tokens that `compared` would return; the student is not run.

        Their shape is (B, N, Ct).

        Args:
            task: The task, for the grid and prefix tokens of its student.
            pixels: (B, 3, H, W), the student's pixels.
            maps: The teachers' maps by name.
        """
        student = task.student
        outline = FeatureMap(pixels, student.grid(*pixels.shape[-2:]), student.num_prefix_tokens)
        return self.teacher_tokens(outline, maps[self.teacher])

    def teacher_tokens(self, student: FeatureMap, teacher: FeatureMap) -> Tensor:
        """Returns the teacher's tokens that `compared` would return, (B, N, Ct).

        Args:
            student: A map with the grid and number of prefix tokens of the student's map; its
                tokens are not read.
            teacher: The teacher's map, any floating-point dtype.
        """
        if self.kind == SUMMARY:
            self._note_prefix(0)
            return self._summary_of(teacher)
        grid, prefix = self.given(student.grid, student.num_prefix_tokens)
        tokens = teacher.tokens.new_empty(len(teacher.tokens), prefix + grid[0] * grid[1], 1)
        return self._aligned(FeatureMap(tokens, grid, prefix), teacher)[1].tokens

    def _aligned(self, student: FeatureMap, teacher: FeatureMap) -> tuple[FeatureMap, FeatureMap]:
        """Returns the head's map and the teacher's on a common grid."""
        student, teacher = align(
            student, teacher, interpolation=self._interpolation, with_prefix=self._with_prefix
        )
        self._note_prefix(student.num_prefix_tokens)
        return student, teacher

    def _summary_of(self, teacher: FeatureMap) -> Tensor:
        """Returns the teacher's summary (B, 1, Ct), or its embedding, in float32."""
        summaries = summary(teacher)
        return summaries if self._projection is None else summaries.float() @ self._projection.T

    def _note_prefix(self, number: int) -> None:
        """Tells loss and normaliser the number of prefix tokens among the compared tokens."""
        for each in (self.loss, *self.stateful):
            each.num_prefix_tokens = number

    def given(self, grid: Grid, num_prefix_tokens: int) -> tuple[Grid, int]:
        """Returns grid and prefix tokens of the head's output, from those of the student's map."""
        if isinstance(self.head, MapHead):
            return self.head.grid_from(grid), self.head.num_prefix_tokens
        return grid, num_prefix_tokens

    def places(self, student: Grid, teacher: Grid) -> Grid:
        """Returns the common grid for comparing maps, from the grids of student and teacher.

        Raises: ShapeError: if they differ after the head, and are not to be interpolated.
        """
        return common_grid(self.given(student, 0)[0], teacher, interpolation=self._interpolation)

    def value(self, projected: Tensor, tokens: Tensor) -> Tensor:
        """Returns the loss without its weight, a float32 scalar; by a fused kernel if there is one.

        Args:
            projected: (B, N, Ct), the student's tokens after the head.
            tokens: (B, N, Ct), the teacher's tokens, any floating-point dtype.
        """
        if self._eps is not None:
            fused = self.loss.fused(projected, tokens, self._eps)
            if fused is not None:
                return fused
        return super().value(projected, tokens)

    def per_image(self, projected: Tensor, tokens: Tensor) -> Tensor:
        """Returns the loss of each image without its weight, (B,) float32; its mean is `value`.

        Args: As `value`.
        """
        normalised = self.normalise(tokens.detach())
        return self.loss.per_image(projected.to(normalised.dtype), normalised)


def guess(
    head: nn.Module,
    student: FeatureMap,
    blocks: Sequence[FeatureMap],
    *,
    kind: str,
    with_prefix: bool,
    num_prefix_tokens: int,
) -> FeatureMap:
    """Returns a head's output for a student's map.

    Args:
        head: From tokens to tokens, or a `MapHead`.
        student: The student's map, in the data type of the head.
        blocks: The maps after its blocks, where the head reads them.
        kind: "map", or "summary" for a map with a single place.
        with_prefix: Whether the map's prefix tokens (CLS) are learnt with it.
        num_prefix_tokens: Tokens before the patches of the teacher's map.
    """
    if kind == SUMMARY:
        student, *blocks = (as_map(summary(map_)) for map_ in (student, *blocks))
    if isinstance(head, MapHead):
        output: FeatureMap = head(tuple(blocks) if head.reads_blocks else student)
        return output
    k = student.num_prefix_tokens
    if k and not (with_prefix and k == num_prefix_tokens):
        student = FeatureMap(student.tokens[:, k:], student.grid, 0)
    return student._replace(tokens=head(student.tokens))


def reads_blocks(head: nn.Module) -> bool:
    """Returns whether a head reads the maps of the student's blocks."""
    return isinstance(head, MapHead) and head.reads_blocks


def summary(feature_map: FeatureMap) -> Tensor:
    """Returns the summary of each image, (B, 1, C), which is its class token if there is one.

    The class token is `feature_map.summary` or the map's first prefix token. Without either, the
    summary is the mean of all tokens.
    """
    if feature_map.summary is not None:
        return feature_map.summary
    if feature_map.num_prefix_tokens:
        return feature_map.tokens[:, :1]
    return feature_map.tokens.mean(1, keepdim=True)


def as_map(summaries: Tensor) -> FeatureMap:
    """Returns summaries (B, 1, C) as maps with a single place, for heads that read maps."""
    return FeatureMap(summaries, (1, 1), 0)


def references(task: Distillation, **prepared: Any) -> list[Tensor]:
    """Returns the teacher's normalised tokens of each target, (B, N, Ct) float32.

    Args:
        task: The task, in evaluation mode, in which normalisers use their running statistics.
        prepared: Result of the task's `prepare`.
    """
    with torch.no_grad():
        return [target.normalise(target.tokens_of(task, **prepared)) for target in task.targets]

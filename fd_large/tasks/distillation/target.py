"""Targets of a recipe, each of which compares maps or summaries of a teacher and the student.

`NamedTarget` extends `Target` of task.py: it has a label, compares maps or summaries, and aligns
grids and prefix tokens.
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
    """A head on the student's map, and the loss between its output and a teacher's map or summary.

    A loss or normaliser may have a state that training updates. Such an object has the methods
    `state(label)`, which returns the Modules of the state by their names in checkpoints, and
    `part(target)`, which returns the part of a step that updates the state.

    Args:
        head: A Module from tokens (B, N, width) to (B, N, teacher_width), or a `MapHead`.
        teacher, weight: As in `Target`.
        normalise: Maps tokens (..., teacher_width) to normalised tokens of the same shape in
            float32.
        loss: The loss.
        kind: "map" or "summary".
        fused_eps: Constant that whitening adds to a token's variance, if a kernel may fuse
            whitening and loss; else None.
        interpolation: How maps of different grids are resized (alignment.py). With "none",
            different grids are an error.
        with_prefix: Whether the prefix tokens (CLS) of the map are learnt too.
        projection: (teacher_width, channels of the teacher's map), the matrix from the teacher's
            summary to its embedding; None to learn the summary without a projection.

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
        """A list with the normaliser and the loss, each only if training updates a state of it."""
        return [each for each in (self.normalise, self.loss) if hasattr(each, "part")]

    def modules(self) -> dict[str, nn.Module]:
        """Returns {name in checkpoints: module} for head, loss state and normaliser state."""
        modules = {self.path: self.head}
        for each in self.stateful:
            modules |= each.state(self.label)
        return modules

    def parts(self) -> tuple[Part, ...]:
        """Returns the parts of a step that update the state of loss and normaliser."""
        return tuple(each.part(self) for each in self.stateful)

    def compared(self, student_maps: Seen, teacher: FeatureMap) -> tuple[Tensor, Tensor]:
        """Returns the student's tokens after the head, and the teacher's tokens, (B, N, Ct) each.

        The tokens are on a common grid, and N is 1 for a summary.

        Args:
            student_maps: The student's maps, in the data type of the head.
            teacher: The teacher's map, of any floating-point dtype.

        Raises: ShapeError: if the grids differ and the interpolation is "none".
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
        """Returns the teacher's tokens that the loss compares, (B, N, Ct), before the normaliser.

        The student is not run.

        Args:
            task: The task, whose student gives the grid and the number of prefix tokens.
            pixels: (B, 3, H, W), the student's pixels, of which only the size is used.
            maps: The teachers' maps by name.
        """
        student = task.student
        outline = FeatureMap(pixels, student.grid(*pixels.shape[-2:]), student.num_prefix_tokens)
        return self.teacher_tokens(outline, maps[self.teacher])

    def teacher_tokens(self, student: FeatureMap, teacher: FeatureMap) -> Tensor:
        """Returns the teacher's tokens that the loss compares, (B, N, Ct), before the normaliser.

        Args:
            student: A map with the grid and the number of prefix tokens of the student's map; its
                tokens are not read.
            teacher: The teacher's map, of any floating-point dtype.
        """
        if self.kind == SUMMARY:
            self._note_prefix(0)
            return self._summary_of(teacher)
        grid, prefix = self.given(student.grid, student.num_prefix_tokens)
        tokens = teacher.tokens.new_empty(len(teacher.tokens), prefix + grid[0] * grid[1], 1)
        return self._aligned(FeatureMap(tokens, grid, prefix), teacher)[1].tokens

    def _aligned(self, student: FeatureMap, teacher: FeatureMap) -> tuple[FeatureMap, FeatureMap]:
        """Returns the head's output and the teacher's map on a common grid, as `align` does.

        Args:
            student: The head's output.
            teacher: The teacher's map.
        """
        student, teacher = align(
            student, teacher, interpolation=self._interpolation, with_prefix=self._with_prefix
        )
        self._note_prefix(student.num_prefix_tokens)
        return student, teacher

    def _summary_of(self, teacher: FeatureMap) -> Tensor:
        """Returns the teacher's summary, (B, 1, Ct), or its projection.

        If the target has a projection, the result is the projected summary, (B, 1, C) float32.

        Args:
            teacher: The teacher's map.
        """
        summaries = summary(teacher)
        return summaries if self._projection is None else summaries.float() @ self._projection.T

    def _note_prefix(self, number: int) -> None:
        """Tells loss and normaliser that `number` tokens of an image are prefix tokens."""
        for each in (self.loss, *self.stateful):
            each.num_prefix_tokens = number

    def given(self, grid: Grid, num_prefix_tokens: int) -> tuple[Grid, int]:
        """Returns the grid and the number of prefix tokens of the head's output.

        Args:
            grid: Rows and columns of the student's map.
            num_prefix_tokens: Number of prefix tokens of the student's map.
        """
        if isinstance(self.head, MapHead):
            return self.head.grid_from(grid), self.head.num_prefix_tokens
        return grid, num_prefix_tokens

    def places(self, student: Grid, teacher: Grid) -> Grid:
        """Returns the rows and columns of the grid on which student and teacher are compared.

        Args:
            student: Rows and columns of the student's map, before the head.
            teacher: Rows and columns of the teacher's map.

        Raises:
            ShapeError: if the head's output and the teacher's map have different grids and the
                interpolation is "none".
        """
        return common_grid(self.given(student, 0)[0], teacher, interpolation=self._interpolation)

    def value(self, projected: Tensor, tokens: Tensor) -> Tensor:
        """Returns the unweighted loss, a float32 scalar.

        If the loss has a kernel that is fused with whitening, this kernel computes the result.

        Args:
            projected: (B, N, Ct), the student's tokens after the head.
            tokens: (B, N, Ct), the teacher's tokens before the normaliser, of any floating-point
                dtype.
        """
        if self._eps is not None:
            fused = self.loss.fused(projected, tokens, self._eps)
            if fused is not None:
                return fused
        return super().value(projected, tokens)

    def per_image(self, projected: Tensor, tokens: Tensor) -> Tensor:
        """Returns the unweighted loss of each image, (B,) float32.

        The mean over images is the result of `value`.

        Args:
            projected: (B, N, Ct), the student's tokens after the head.
            tokens: (B, N, Ct), the teacher's tokens before the normaliser, of any floating-point
                dtype.
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
    """Returns a head's output for a student's map, a prediction of the teacher's map.

    Args:
        head: A Module from tokens to tokens, or a `MapHead`.
        student: The student's map, in the data type of the head.
        blocks: The maps after the student's blocks; empty if the head does not read them.
        kind: "map", or "summary" to run the head on summaries, as maps of a single patch.
        with_prefix: Whether the prefix tokens (CLS) of the map are learnt too.
        num_prefix_tokens: Number of tokens before the patches of the teacher's map.
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
    """Whether `head` reads the maps after each of the student's blocks instead of the last map."""
    return isinstance(head, MapHead) and head.reads_blocks


def summary(feature_map: FeatureMap) -> Tensor:
    """Returns the summary of each image in `feature_map`, (B, 1, C).

    The summary is the class token, which is `feature_map.summary` or else the first prefix token.
    For a map without a class token it is the mean of all tokens.
    """
    if feature_map.summary is not None:
        return feature_map.summary
    if feature_map.num_prefix_tokens:
        return feature_map.tokens[:, :1]
    return feature_map.tokens.mean(1, keepdim=True)


def as_map(summaries: Tensor) -> FeatureMap:
    """Returns `summaries`, (B, 1, C), as maps with a single patch, for heads that read maps."""
    return FeatureMap(summaries, (1, 1), 0)


def references(task: Distillation, **prepared: Any) -> list[Tensor]:
    """Returns the teacher's normalised tokens of each target, (B, N, Ct) float32.

    Args:
        task: The task, in evaluation mode, in which normalisers use their running statistics.
        prepared: Result of the task's `prepare`.
    """
    with torch.no_grad():
        return [target.normalise(target.tokens_of(task, **prepared)) for target in task.targets]

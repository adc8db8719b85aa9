"""What a student learns of one teacher: its map, or its summary.

A run has a target for each teacher and kind; its loss is their sum by weight (task.py). All that a
target needs beside the student stands here: head, alignment, normaliser, loss and weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.errors import ConfigError
from fd_large.tasks.distillation.alignment import Grid, common_grid, match_grids, match_prefixes
from fd_large.tasks.distillation.heads import registry
from fd_large.tasks.distillation.heads.map_head import MapHead, Maps
from fd_large.tasks.distillation.losses import QueueDivergence, Relation, make_loss
from fd_large.tasks.distillation.normalisers import NONE, WHITENING, make_normaliser
from fd_large.tasks.distillation.running_statistics import Moments, RunningStatistics
from fd_large.tasks.distillation.section import MAP, SUMMARY, field_of, label, naming_target
from fd_large.tasks.distillation.similarity import SummaryQueue


class Target:
    """A head on the student's tokens, and the loss between them and a teacher's.

    It is no Module: the task registers its head and its running statistics, under the names that
    checkpoints have.

    Args:
        width: Channels of the student's map.
        teacher_width: Channels of what is learnt of the teacher.
        teacher: The teacher's name; "" for the only one.
        kind: "map" or "summary".
        loss: Name of the loss (losses.py).
        normaliser: Name of what is done to the teacher's tokens (normalisers.py).
        head: Name of what projects the student's tokens to the teacher's width (heads/).
        maps: Returns the grids of both, for a head that reads maps.
        beta: Difference above which the loss is linear rather than quadratic, in whitened units.
        whitening_eps: Constant added to the variance of a teacher's token.
        target_statistics: File of statistics of the teacher's channels, for a normaliser that
            needs them.
        interpolation: How maps of different grids are brought to one (alignment.py); "none"
            refuses them.
        with_prefix: Whether the map's prefix tokens (CLS) are learnt with it.
        weight: Weight of its loss in the task's.
        projection: (teacher_width, channels of the teacher's map), by which the teacher's summary
            becomes its embedding; None: the summary itself is learnt.

    Attributes:
        teacher, kind, weight: As given.
        head: The Module from (B, N, width) to (B, N, teacher_width), or a `MapHead`.
        reads_blocks: Whether the head reads the maps of the student's blocks.
        loss: The loss.
        queue: Summaries of earlier steps, where the loss compares with them.
        normalise: From tokens (..., teacher_width) to the same in float32.
        running: `normalise`, where it has statistics that training moves; else None.
    """

    def __init__(
        self,
        width: int,
        teacher_width: int,
        *,
        teacher: str = "",
        kind: str = MAP,
        loss: str = "smooth_l1",
        normaliser: str = WHITENING,
        head: str = "linear",
        maps: Callable[[], Maps] | None = None,
        beta: float = 2.0,
        whitening_eps: float = 1e-5,
        target_statistics: str = "",
        interpolation: str = "none",
        with_prefix: bool = True,
        weight: float = 1.0,
        projection: Tensor | None = None,
    ) -> None:
        self._projection = projection
        self.teacher, self.kind, self.weight = teacher, kind, weight
        with naming_target(teacher, kind):
            self.head = registry.make(head, width, teacher_width, maps)
            self.loss = make_loss(loss, beta=beta)
            self.normalise = make_normaliser(
                normaliser, eps=whitening_eps, statistics=target_statistics, width=teacher_width
            )
        self.reads_blocks = reads_blocks(self.head)
        if isinstance(self.loss, Relation) and kind == SUMMARY:
            raise ConfigError(
                f"{field_of(teacher, 'loss', kind)}: a summary alone has nothing to relate to; got "
                f"{loss}, expected a loss between two summaries. Set "
                f"--{field_of(teacher, 'loss', kind)} queue, cosine or mse."
            )
        self.queue: SummaryQueue | None = None
        if isinstance(self.loss, QueueDivergence):
            if kind != SUMMARY:
                raise ConfigError(
                    f"{field_of(teacher, 'loss')}: a queue holds summaries; got {loss} for a map, "
                    "expected it for the summary of one of several teachers. Set it in "
                    "--teachers.NAME.summary.loss."
                )
            if normaliser != NONE:
                raise ConfigError(
                    f"{field_of(teacher, 'normaliser', kind)}: a queue holds summaries as the "
                    f"teacher gives them; got {normaliser}, expected {NONE}. Set "
                    f"--{field_of(teacher, 'normaliser', kind)} {NONE}."
                )
            self.queue = self.loss.queue = SummaryQueue(teacher_width)
        is_running = isinstance(self.normalise, RunningStatistics)
        self.running = cast(RunningStatistics, self.normalise) if is_running else None
        self._eps = whitening_eps if normaliser == WHITENING else None
        self._interpolation, self._with_prefix = interpolation, with_prefix

    @property
    def label(self) -> str:
        """Its name in metrics and files: "" for the only teacher's map, else NAME, NAME_summary."""
        return label(self.teacher, self.kind)

    def compared(
        self, student: FeatureMap, blocks: Sequence[FeatureMap], teacher: FeatureMap
    ) -> tuple[Tensor, Tensor]:
        """Returns the tokens that are compared, (B, N, Ct): the student's after the head, and the
        teacher's. Of two summaries N is 1.

        Args:
            student: The student's map, in the data type of the head.
            blocks: The maps after its blocks, where the head reads them.
            teacher: The teacher's map, any floating-point dtype.

        Raises: ShapeError: if the grids of two maps differ and are not to be interpolated.
        """
        if self.kind == SUMMARY:
            teacher = as_map(self._summary_of(teacher))
        student = self.guessed(student, blocks, teacher.num_prefix_tokens)
        student, teacher = match_prefixes(student, teacher, with_prefix=self._with_prefix)
        student, teacher = match_grids(student, teacher, interpolation=self._interpolation)
        self._note_prefix(student.num_prefix_tokens)
        return student.tokens, teacher.tokens

    def guessed(
        self, student: FeatureMap, blocks: Sequence[FeatureMap], num_prefix_tokens: int
    ) -> FeatureMap:
        """Returns what the head makes of the student's map, with `teacher_width` channels.

        Args:
            student, blocks: As `compared`.
            num_prefix_tokens: Tokens before the patches of the teacher's map; where the student's
                are as many, and are learnt, the head is given them as well.
        """
        return guess(
            self.head,
            student,
            blocks,
            kind=self.kind,
            with_prefix=self._with_prefix,
            num_prefix_tokens=num_prefix_tokens,
        )

    def teacher_tokens(self, student: FeatureMap, teacher: FeatureMap) -> Tensor:
        """Returns the teacher's tokens of `compared`, (B, N, Ct).

        Args:
            student: A map with the grid and prefix of the student's, whatever its tokens.
            teacher: The teacher's map, any floating-point dtype.
        """
        if self.kind == SUMMARY:
            self._note_prefix(0)
            return self._summary_of(teacher)
        grid, prefix = self.given(student.grid, student.num_prefix_tokens)
        tokens = teacher.tokens.new_empty(len(teacher.tokens), prefix + grid[0] * grid[1], 1)
        matched = match_prefixes(
            FeatureMap(tokens, grid, prefix), teacher, with_prefix=self._with_prefix
        )
        student, teacher = match_grids(*matched, interpolation=self._interpolation)
        self._note_prefix(student.num_prefix_tokens)
        return teacher.tokens

    def _summary_of(self, teacher: FeatureMap) -> Tensor:
        """The teacher's summary (B, 1, Ct), or its embedding, in float32."""
        found = summary(teacher)
        return found if self._projection is None else found.float() @ self._projection.T

    def _note_prefix(self, number: int) -> None:
        """Tells loss and normaliser how many tokens of those that are compared are no patches."""
        self.loss.num_prefix_tokens = number
        if self.running is not None:
            self.running.num_prefix_tokens = number

    def given(self, grid: Grid, num_prefix_tokens: int) -> tuple[Grid, int]:
        """Returns grid and prefix tokens of what the head gives, of those of the student's map."""
        if isinstance(self.head, MapHead):
            return self.head.grid_from(grid), self.head.num_prefix_tokens
        return grid, num_prefix_tokens

    def places(self, student: Grid, teacher: Grid) -> Grid:
        """Returns the grid on which maps are compared, of the grids of student and teacher.

        Raises: ShapeError: if they differ after the head, and are not to be interpolated.
        """
        return common_grid(self.given(student, 0)[0], teacher, interpolation=self._interpolation)

    def normalised(self, tokens: Tensor, step: Moments | None = None) -> Tensor:
        """Returns the teacher's tokens (B, N, Ct) normalised, float32.

        Args:
            tokens: (B, N, Ct), any floating-point dtype.
            step: The statistics of the step, where `running` is to normalise by them.
        """
        if step is None:
            return self.normalise(tokens)
        assert self.running is not None
        return self.running(tokens, step)

    def value(self, projected: Tensor, tokens: Tensor, step: Moments | None = None) -> Tensor:
        """Returns the loss without its weight, a float32 scalar.

        Args:
            projected: (B, N, Ct), the student's tokens after the head.
            tokens: (B, N, Ct), the teacher's, any floating-point dtype.
            step: See `normalised`.
        """
        if self._eps is not None:
            fused = self.loss.fused(projected, tokens, self._eps)
            if fused is not None:
                return fused
        wanted = self.normalised(tokens.detach(), step)
        return self.loss(projected.to(wanted.dtype), wanted)

    def per_image(self, projected: Tensor, tokens: Tensor, step: Moments | None = None) -> Tensor:
        """Returns the loss of each image without its weight, (B,) float32; its mean is `value`.

        Args: As `value`.
        """
        wanted = self.normalised(tokens.detach(), step)
        return self.loss.per_image(projected.to(wanted.dtype), wanted)

    def cosine(self, projected: Tensor, tokens: Tensor) -> Tensor:
        """Returns the mean cosine of projected and normalised tokens, a scalar.

        Args: As `value`.
        """
        wanted = self.normalise(tokens)
        return F.cosine_similarity(projected.float(), wanted, dim=-1).mean()


def guess(
    head: nn.Module,
    student: FeatureMap,
    blocks: Sequence[FeatureMap],
    *,
    kind: str,
    with_prefix: bool,
    num_prefix_tokens: int,
) -> FeatureMap:
    """Returns what a head makes of a student's map.

    Args:
        head: From tokens to tokens, or a `MapHead`.
        student: The student's map, in the data type of the head.
        blocks: The maps after its blocks, where the head reads them.
        kind: "map" or "summary", which is a map of one place.
        with_prefix: Whether the map's prefix tokens (CLS) are learnt with it.
        num_prefix_tokens: Tokens before the patches of the teacher's map.
    """
    if kind == SUMMARY:
        student, *blocks = (as_map(summary(map_)) for map_ in (student, *blocks))
    if isinstance(head, MapHead):
        found: FeatureMap = head(tuple(blocks) if head.reads_blocks else student)
        return found
    k = student.num_prefix_tokens
    if k and not (with_prefix and k == num_prefix_tokens):
        student = FeatureMap(student.tokens[:, k:], student.grid, 0)
    return student._replace(tokens=head(student.tokens))


def reads_blocks(head: nn.Module) -> bool:
    """Returns whether a head reads the maps of the student's blocks."""
    return isinstance(head, MapHead) and head.reads_blocks


def summary(feature_map: FeatureMap) -> Tensor:
    """Returns the summary of an image, (B, 1, C): its class token.

    That is the one that the map leaves out, or its first prefix token. Of a map without either it
    is the mean of all tokens.
    """
    if feature_map.summary is not None:
        return feature_map.summary
    if feature_map.num_prefix_tokens:
        return feature_map.tokens[:, :1]
    return feature_map.tokens.mean(1, keepdim=True)


def as_map(summaries: Tensor) -> FeatureMap:
    """Returns summaries (B, 1, C) as maps of one place, for heads that read maps."""
    return FeatureMap(summaries, (1, 1), 0)

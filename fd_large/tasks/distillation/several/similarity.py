"""Losses on similarities of a summary to other images' summaries, or of patches to each other.

Each loss is the Kullback-Leibler divergence between two softmaxes of cosines, which pulls the
student's distribution towards the teacher's. Source: distillation in lightly-train, version 1
(against a queue) and version 3 (between the tokens of an image too).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.float32_buffers import Float32Buffers
from fd_large.engine.parts import Part
from fd_large.errors import ConfigError
from fd_large.ranks import distributed
from fd_large.tasks.distillation.losses import Loss
from fd_large.tasks.distillation.normalisers import NONE
from fd_large.tasks.distillation.section import SUMMARY, field_of

QUEUE = 8192
"""Number of summaries in a queue, as in lightly-train for large datasets."""


class SummaryQueue(Float32Buffers):
    """The newest summaries of a teacher, in the order of the positions of the steps' images.

    lightly-train has a queue on each rank, so that its loss depends on the number of ranks; here
    a single queue holds global batches. It is updated once with each accepted step and is part of
    a checkpoint.

    Args:
        width: Channels of a summary, C.

    Attributes:
        rows: (Q, C), summaries of unit L2 norm; zeros in unused rows.
    """

    rows: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(QUEUE, width))
        self._of_step: Tensor | None = None
        self._placed, self._micro_batches = 0, 1

    @property
    def now(self) -> Tensor:
        """The rows; in a training step its own summaries come first, as in lightly-train."""
        learns = self._of_step is not None and torch.is_grad_enabled()
        return self._of_step if learns else self.rows

    def begin(self, micro_batches: int) -> None:
        """Begins the passes of a step with this number of micro batches on each rank."""
        self._of_step, self._placed, self._micro_batches = None, 0, micro_batches

    def placed(self, summaries: Tensor) -> Tensor:
        """Returns the global batch, flat, with summaries (B, C) at their places, zeros elsewhere.

        The sum over the micro batches of all ranks gives the step's summaries, float64. A rank's
        micro batches have consecutive positions, and the calls come in their order. Summaries
        that would fall out of the queue at once are left out.
        """
        size = len(summaries)
        number = distributed.rank() * self._micro_batches + self._placed
        total = size * self._micro_batches * distributed.world_size()
        self._placed += 1
        batch = summaries.new_zeros(total, summaries.shape[-1], dtype=torch.float64)
        batch[number * size : (number + 1) * size] = units(summaries.double())
        return batch[:QUEUE].flatten()

    def take(self, batch: Tensor) -> None:
        """Puts a step's summaries first in the queue that the losses of this step read.

        Args:
            batch: The summaries, flat as `placed` returns them.
        """
        self._of_step = pushed(self.rows, batch.view(-1, self.rows.shape[-1]).to(self.rows))

    @torch.no_grad()
    def move(self) -> None:
        """Keeps the step's summaries in the queue."""
        assert self._of_step is not None
        self.rows.copy_(self._of_step)
        self._of_step = None


class QueueOfStep(Part):
    """Adds the summaries of each step to a target's queue."""

    def __init__(self, target: Any, queue: SummaryQueue) -> None:
        self._target, self._queue = target, queue

    def begin(self, micro_batches: int) -> None:
        """Begins the passes of a step with this number of micro batches on each rank."""
        self._queue.begin(micro_batches)

    def sums(self, task: Any, prepared: dict[str, Any]) -> Tensor:
        """Returns the teacher's summaries at their places in the global batch, flat."""
        return self._queue.placed(self._target.tokens_of(task, **prepared)[:, 0])

    def take(self, totals: Tensor, micro_batches: int) -> None:
        """Puts the step's summaries first in the queue that the losses of this step read."""
        self._queue.take(totals)

    def after_step(self, noted: Tensor | None) -> None:
        """Keeps the step's summaries in the queue."""
        self._queue.move()


def units(tokens: Tensor) -> Tensor:
    """Returns tokens (..., C) scaled to unit L2 norm."""
    return F.normalize(tokens, dim=-1)


def queue_divergence(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    temperature: float = Loss.temperature,
) -> Tensor:
    """Returns each image's divergence between similarities to the summaries of a queue, (B,).

    Args:
        student: (B, C), of unit L2 norm.
        teacher: (B, C), of unit L2 norm; takes no gradient.
        queue: (Q, C), rows of unit L2 norm, or of zeros, which count in the softmax too.
        temperature: Divisor of cosines.
    """
    return _divergence(student @ queue.T, teacher @ queue.T, temperature)


def relation_divergence(
    student: Tensor, teacher: Tensor, temperature: float = Loss.temperature
) -> Tensor:
    """Returns each image's divergence between similarities of its tokens, (B,).

    It is a mean over tokens; each token is compared with all tokens of its image, itself
    included. The widths of student and teacher may differ.

    Args:
        student: (B, N, Cs), of unit L2 norm.
        teacher: (B, N, Ct), of unit L2 norm; takes no gradient.
        temperature: Divisor of cosines.
    """
    return _divergence(student @ student.mT, teacher @ teacher.mT, temperature).mean(-1)


def pushed(queue: Tensor, summaries: Tensor) -> Tensor:
    """Returns a queue (Q, C) with the summaries (B, C) of a batch in front, newest first.

    The oldest fall out; of a batch larger than the queue, the first summaries stay.
    """
    return torch.cat([summaries, queue])[: len(queue)]


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns KL(teacher || student) of softmaxes over the last dimension of cosines."""
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.detach() / temperature, dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


class Relation(Loss):
    """Divergence between student's and teacher's similarities of an image's patches.

    Memory grows with the square of the number of patches.
    """

    label = "relation loss"
    reads_beta, reads_temperature = False, True

    def begin(self, teacher: str, kind: str, *, width: int, normaliser: str) -> None:
        """Refuses a summary."""
        field = field_of(teacher, "loss", kind)
        if kind == SUMMARY:
            raise ConfigError(
                f"{field}: relation does not work on a single summary; got relation, expected a "
                f"loss between two summaries. Set --{field} queue, cosine or mse."
            )

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the mean over images."""
        return self.per_image(projected, target).mean()

    def per_image(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the divergence of each image, (B,)."""
        student, teacher = (units(t[:, self.num_prefix_tokens :]) for t in (projected, target))
        return relation_divergence(student, teacher, self.temperature)


class QueueDivergence(Loss):
    """Divergence between student's and teacher's similarities to other images' summaries.

    It works on summaries only.

    Attributes:
        queue: The other images' summaries; None in a trial, which uses the summaries of its batch.
    """

    label = "queue loss"
    reads_beta = in_sums = False
    reads_temperature = True
    queue: SummaryQueue | None = None

    def begin(self, teacher: str, kind: str, *, width: int, normaliser: str) -> None:
        """Makes the queue for the teacher's summaries."""
        if kind != SUMMARY:
            raise ConfigError(
                f"{field_of(teacher, 'loss')}: a queue takes summaries; got queue for a map, "
                "expected it for the summary of one of several teachers. Set it in "
                "--teachers.NAME.summary.loss."
            )
        field = field_of(teacher, "normaliser", kind)
        if normaliser != NONE:
            raise ConfigError(
                f"{field}: a queue takes summaries that are not normalised; got {normaliser}, "
                f"expected {NONE}. Set --{field} {NONE}."
            )
        self.queue = SummaryQueue(width)

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the mean over images."""
        return self.per_image(projected, target).mean()

    def per_image(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the divergence of each image, (B,)."""
        student, teacher = (units(summaries[:, 0]) for summaries in (projected, target))
        rows = teacher if self.queue is None else self.queue.now.to(teacher)
        return queue_divergence(student, teacher, rows, self.temperature)

    def state(self, label: str) -> dict[str, nn.Module]:
        """Returns the queue by its name in checkpoints."""
        assert self.queue is not None
        return {f"queues.{label}": self.queue}

    def part(self, target: Any) -> Part:
        """Returns the part that updates the queue, for this loss's target."""
        assert self.queue is not None
        return QueueOfStep(target, self.queue)

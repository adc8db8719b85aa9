"""Losses on the similarities of a summary to other summaries, or of an image's patches.

Each loss is the Kullback-Leibler divergence KL(teacher || student) between two softmaxes over
cosines. Source: the distillation of lightly-train. Version 1 of lightly-train's distillation
compares summaries with a queue; version 3 also compares the tokens of an image with each other.
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
    """Queue of a teacher's summaries of the newest images, the same on all ranks.

    The summaries of a step are in the order of the images in the global batch. The queue is updated
    once in each step that is not skipped, and is part of a checkpoint. In lightly-train each rank
    has a queue of its own, so that the loss depends on the number of ranks.

    Args:
        width: Number of channels of a summary, C.

    Attributes:
        rows: (Q, C), summaries of unit L2 norm, those of the newest step first; unused rows are
            zeros.
    """

    rows: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(QUEUE, width))
        self._of_step: Tensor | None = None
        self._placed, self._micro_batches = 0, 1

    @property
    def now(self) -> Tensor:
        """The summaries that losses read, (Q, C).

        In a training step the summaries of the step itself come first, as in lightly-train. Without
        gradients, or outside of a step, the result is `rows`.
        """
        learns = self._of_step is not None and torch.is_grad_enabled()
        return self._of_step if learns else self.rows

    def begin(self, micro_batches: int) -> None:
        """Begins a step, in which `placed` is called once for each micro-batch of this rank.

        Args:
            micro_batches: Number of micro-batches of each rank in the step.
        """
        self._of_step, self._placed, self._micro_batches = None, 0, micro_batches

    def placed(self, summaries: Tensor) -> Tensor:
        """Returns the summaries of a micro-batch at their positions in the global batch.

        The k-th call since `begin` takes the rank's k-th micro-batch, and the micro-batches of a
        rank are consecutive in the global batch. The sum of the results over the micro-batches of
        all ranks gives the summaries of the whole step. Only the first Q images of the global batch
        are kept, as the queue has no room for more.

        Args:
            summaries: (B, C), of any norm.

        Returns: the global batch of at most Q images, flat (images * C,) float64, with zeros at the
            images of other micro-batches.
        """
        size = len(summaries)
        number = distributed.rank() * self._micro_batches + self._placed
        total = size * self._micro_batches * distributed.world_size()
        self._placed += 1
        batch = summaries.new_zeros(total, summaries.shape[-1], dtype=torch.float64)
        batch[number * size : (number + 1) * size] = units(summaries.double())
        return batch[:QUEUE].flatten()

    def take(self, batch: Tensor) -> None:
        """Puts a step's summaries first in the queue that the losses of the step read.

        Args:
            batch: The step's summaries, the sum of the results of `placed`.
        """
        self._of_step = pushed(self.rows, batch.view(-1, self.rows.shape[-1]).to(self.rows))

    @torch.no_grad()
    def move(self) -> None:
        """Sets `rows` to the queue that `take` made, which begins with the step's summaries."""
        assert self._of_step is not None
        self.rows.copy_(self._of_step)
        self._of_step = None


class QueueOfStep(Part):
    """The part of a step that adds the step's summaries to the queue of a target's loss.

    Args:
        target: The target, whose teacher's summaries are added.
        queue: The queue.
    """

    def __init__(self, target: Any, queue: SummaryQueue) -> None:
        self._target, self._queue = target, queue

    def begin(self, micro_batches: int) -> None:
        """Begins a step that has `micro_batches` micro-batches on each rank."""
        self._queue.begin(micro_batches)

    def sums(self, task: Any, prepared: dict[str, Any]) -> Tensor:
        """Returns the teacher's summaries of a micro-batch, as `SummaryQueue.placed` returns them.

        Args:
            task: The task, whose student is not run.
            prepared: Result of the task's `prepare` on the micro-batch.
        """
        return self._queue.placed(self._target.tokens_of(task, **prepared)[:, 0])

    def take(self, totals: Tensor, micro_batches: int) -> None:
        """Puts the step's summaries first in the queue that the losses of the step read.

        Args:
            totals: The summaries of the step, the sum of the results of `sums` over all
                micro-batches of all ranks.
            micro_batches: Not used.
        """
        self._queue.take(totals)

    def after_step(self, noted: Tensor | None) -> None:
        """Stores the summaries of the finished step in the queue.

        Args:
            noted: Not used.
        """
        self._queue.move()


def units(tokens: Tensor) -> Tensor:
    """Returns `tokens`, (..., C), scaled to unit L2 norm over the last dimension."""
    return F.normalize(tokens, dim=-1)


def queue_divergence(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    temperature: float = Loss.temperature,
) -> Tensor:
    """Returns the divergence KL(teacher || student) for each image, (B,).

    The distributions of student and teacher are the softmaxes over the similarities of an image's
    summary to the summaries of a queue.

    Args:
        student: (B, C), the student's summaries, of unit L2 norm.
        teacher: (B, C), the teacher's summaries, of unit L2 norm; takes no gradient.
        queue: (Q, C), summaries of unit L2 norm; rows of zeros count in the softmax too.
        temperature: Number by which cosines are divided.
    """
    return _divergence(student @ queue.T, teacher @ queue.T, temperature)


def relation_divergence(
    student: Tensor, teacher: Tensor, temperature: float = Loss.temperature
) -> Tensor:
    """Returns the divergence KL(teacher || student) for each image, (B,), a mean over tokens.

    The distributions of student and teacher are the softmaxes over a token's similarities to all
    tokens of the same image, the token itself included. Student and teacher may have different
    widths.

    Args:
        student: (B, N, Cs), the student's tokens, of unit L2 norm.
        teacher: (B, N, Ct), the teacher's tokens, of unit L2 norm; takes no gradient.
        temperature: Number by which cosines are divided.
    """
    return _divergence(student @ student.mT, teacher @ teacher.mT, temperature).mean(-1)


def pushed(queue: Tensor, summaries: Tensor) -> Tensor:
    """Returns `queue`, (Q, C), after `summaries`, (B, C), were added at its front.

    The last B rows of the queue are dropped. If B is larger than Q, the result is the first Q
    summaries of the batch.
    """
    return torch.cat([summaries, queue])[: len(queue)]


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Returns KL(teacher || student), (...), between softmaxes over the last dimension of cosines.

    Args:
        student, teacher: (..., K), cosines; the teacher takes no gradient.
        temperature: Number by which cosines are divided.
    """
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.detach() / temperature, dim=-1)
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


class Relation(Loss):
    """Loss on the similarities between the patches of an image, by `relation_divergence`.

    Memory grows with the square of the number of patches.
    """

    label = "relation loss"
    reads_beta, reads_temperature = False, True

    def begin(self, teacher: str, kind: str, *, width: int, normaliser: str) -> None:
        """Raises ConfigError if the target is a summary, which has no patches; see `Loss.begin`."""
        field = field_of(teacher, "loss", kind)
        if kind == SUMMARY:
            raise ConfigError(
                f"{field}: relation does not work on a single summary; got relation, expected a "
                f"loss between two summaries. Set --{field} queue, cosine or mse."
            )

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the divergence KL(teacher || student), a mean over images, a scalar.

        Args:
            projected: (B, N, Ct), the student's tokens.
            target: (B, N, Ct), the teacher's tokens.
        """
        return self.per_image(projected, target).mean()

    def per_image(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the divergence KL(teacher || student) of each image, (B,).

        The patches of an image are compared with each other; prefix tokens are left out. See
        `relation_divergence`.

        Args:
            projected: (B, N, Ct), the student's tokens.
            target: (B, N, Ct), the teacher's tokens.
        """
        student, teacher = (units(t[:, self.num_prefix_tokens :]) for t in (projected, target))
        return relation_divergence(student, teacher, self.temperature)


class QueueDivergence(Loss):
    """Loss on a summary's similarities to the summaries of a queue, by `queue_divergence`.

    Attributes:
        queue: The teacher's newest summaries. Before `begin` the queue is None, as in the check of
            a recipe; the summaries of a batch are then compared with each other.
    """

    label = "queue loss"
    reads_beta = in_sums = False
    reads_temperature = True
    queue: SummaryQueue | None = None

    def begin(self, teacher: str, kind: str, *, width: int, normaliser: str) -> None:
        """Makes the queue for the teacher's summaries; for the arguments see `Loss.begin`.

        Raises: ConfigError: if the target is not a summary, or if summaries are normalised.
        """
        if kind != SUMMARY:
            raise ConfigError(
                f"{field_of(teacher, 'loss')}: the loss 'queue' works on summaries only; got a "
                "map, expected the summary of one of several teachers. Set queue in "
                "--teachers.NAME.summary.loss."
            )
        field = field_of(teacher, "normaliser", kind)
        if normaliser != NONE:
            raise ConfigError(
                f"{field}: the loss 'queue' works on summaries that are not normalised; got "
                f"{normaliser}, expected {NONE}. Set --{field} {NONE}."
            )
        self.queue = SummaryQueue(width)

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the divergence KL(teacher || student), a mean over images, a scalar.

        Args:
            projected: (B, 1, Ct), the student's summaries.
            target: (B, 1, Ct), the teacher's summaries.
        """
        return self.per_image(projected, target).mean()

    def per_image(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the divergence KL(teacher || student) of each image, (B,).

        The summary of an image is compared with the summaries of the queue; see `queue_divergence`.

        Args:
            projected: (B, 1, Ct), the student's summaries.
            target: (B, 1, Ct), the teacher's summaries.
        """
        student, teacher = (units(summaries[:, 0]) for summaries in (projected, target))
        rows = teacher if self.queue is None else self.queue.now.to(teacher)
        return queue_divergence(student, teacher, rows, self.temperature)

    def state(self, label: str) -> dict[str, nn.Module]:
        """Returns {name in checkpoints: queue}.

        Args:
            label: The target's label; the name is "queues.LABEL".
        """
        assert self.queue is not None
        return {f"queues.{label}": self.queue}

    def part(self, target: Any) -> Part:
        """Returns the part of a step that adds the summaries of `target`'s teacher to the queue."""
        assert self.queue is not None
        return QueueOfStep(target, self.queue)

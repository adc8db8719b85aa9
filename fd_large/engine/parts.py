"""Parts of a step: components of a task that need sums over all images of a step.

Parts are, for example, a queue of summaries, the statistics of a batch, or the number of images or
tokens that count. Each part is a function of the global batch, however ranks and micro batches
divide it. A task lists its parts (`Task.parts`), and the engine adds up their numbers: by one
all-reduce before the step's first backward for parts that are `of_step`, and by at most one
all-reduce after the step.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor


class Part:
    """A component that needs sums over a whole step; all ranks make the same calls of its methods.

    A part that needs no sums before the first backward of a step sets `of_step` to False, and gets
    its sums by `noted` and `after_step`.
    """

    of_step: ClassVar[bool] = True
    """Whether the part needs its sums before the first backward of a step."""

    def begin(self, micro_batches: int) -> None:
        """Called before the first `sums` of a step; each rank has `micro_batches` micro batches."""

    def sums(self, task: Any, prepared: dict[str, Any]) -> Tensor:
        """Returns a micro batch's share of the sums over the step, (K,) float64.

        K is the same for all micro batches and on all ranks. `prepared` is the result of the task's
        `prepare`; the student must not be run.
        """
        raise NotImplementedError

    def take(self, totals: Tensor, micro_batches: int) -> None:
        """Takes the sums over all micro batches of all ranks; called once for each micro batch.

        `totals` has the sums, (K,) float64, and `micro_batches` counts those of all ranks in the
        step.
        """

    def before_step(self, progress: float) -> None:
        """Called before the first forward of a step, to drop numbers of earlier passes.

        Such numbers come from an earlier step, or from forward passes that train nothing.
        `progress` is the fraction of the run's steps that came before this step, in [0, 1).
        """

    def noted(self) -> Tensor | None:
        """Returns the numbers, (K,), that this rank noted in the forward passes of a step.

        The engine sums them over the ranks. The result is None if there is nothing to sum.
        """
        return None

    def after_step(self, noted: Tensor | None) -> None:
        """Called after each step that was not skipped, with the ranks' sum of `noted`, or None."""

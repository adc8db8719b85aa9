"""Evaluations during a run: when they are due, their precision, and how they are interrupted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from fd_large.engine.memory import building_in_memory, out_of_memory_named
from fd_large.engine.task import Task
from fd_large.engine.zero import partition
from fd_large.engine.zero.engine import Engine
from fd_large.engine.zero.state import whole_masters
from fd_large.ranks import distributed

Panel = dict[str, Any]
"""Arrays to draw, by name."""
SECONDS_BETWEEN_CALLS = 1.0
"""Seconds between two reports to the watchdog from ranks that wait for rank 0."""

T = TypeVar("T")


class Pending(Protocol):
    """Metrics of an evaluation that rank 0 still computes, in a separate process.

    Their inputs are kept on disk, so that a later launch of the run can finish the work.
    """

    @property
    def done(self) -> bool:
        """Whether the work is over; False on all ranks but rank 0."""

    def wait(self, meanwhile: Callable[[], None]) -> dict[str, float]:
        """Waits for the metrics and returns them by name; all ranks must call this method.

        `meanwhile` is called repeatedly on all ranks; an error that it raises ends the wait.

        Raises: FDError: on all ranks, if the process that computes the metrics failed.
        """

    def forget(self) -> None:
        """Deletes the stored inputs; called when the metrics have been recorded."""

    def give_up(self) -> None:
        """Stops the work, and leaves it to a later launch of the run."""


class Evaluation(NamedTuple):
    """A measurement that a task makes during training.

    Attributes:
        measure: Function that makes the measurement, called on all ranks with the task in training
            mode, and with the average of the weights in the task if the run keeps one. Arguments:
            the number of finished steps; whether this is the last evaluation; a function to call
            between batches. Returns a dict of numbers by name, or a `Pending` if training goes on
            while the numbers are computed; and the panel of maps for `Hook.on_features`, or None.
        every: Number of steps between two evaluations. 0 evaluates only before the first step and
            after the last step.
        left: Function that a resumed run calls once, on all ranks. Arguments: the run's number of
            finished steps; whether the evaluation due at that step is repeated. Returns the step
            and the `Pending` of an evaluation that an earlier launch of the run did not finish, or
            None.
    """

    measure: Callable[
        [int, bool, Callable[[], None]], tuple[dict[str, float] | Pending, Panel | None]
    ]
    every: int = 0
    left: Callable[[int, bool], tuple[int, Pending] | None] = lambda finished, again: None

    def due(self, step: int, last: bool) -> bool:
        """Returns whether the evaluation is due after `step` steps, or after the `last` step."""
        return last or step == 0 or (bool(self.every) and step % self.every == 0)


def awaited(work: futures.Future[T] | None, meanwhile: Callable[[], None]) -> T | None:
    """Waits on all ranks until work of rank 0 is done; all ranks must call this function.

    No rank waits for long in a single collective: the watchdog would take the rank for hung, and
    the rank could not be stopped.

    Args:
        work: Future of the work that rank 0 waits for; None on other ranks.
        meanwhile: Called about once a second, on all ranks; an error that it raises ends the wait.

    Returns: the result on rank 0, None elsewhere.
    Raises: FDError: on all ranks, if the work raised it.
    """
    while True:
        left = work is not None and bool(futures.wait([work], SECONDS_BETWEEN_CALLS).not_done)
        if not distributed.any_rank(left):
            return distributed.together(lambda: None if work is None else work.result())
        meanwhile()


class Interrupted(Exception):
    """Raised on all ranks together to leave an evaluation before its end."""


class evaluating:
    """Puts an engine's task into evaluation mode within a context, without gradients.

    At its end, also after an error, the task is put into training mode.
    """

    def __init__(self, engine: Engine) -> None:
        self._task, self._no_grad = engine.task, torch.no_grad()

    def __enter__(self) -> None:
        self._task.eval()
        self._no_grad.__enter__()

    def __exit__(self, *error: object) -> None:
        self._no_grad.__exit__(*error)
        self._task.train()


@contextmanager
def in_float32(
    engine: Engine, make_task: Callable[[], Task]
) -> Iterator[Callable[[Tensor, Any], Any]]:
    """Yields the task's forward in evaluation mode and float32, as a function of (images, targets).

    If the engine computes in bfloat16 at stages 0 to 2, the function calls a float32 copy of the
    task, from `make_task`, with the values of the master weights. The copy takes 4 bytes a
    parameter within the block. Under ZeRO-3 the function computes in the precision of training
    instead, since a rank's memory may not hold the whole model. Making the copy is a collective,
    and so is each call under ZeRO-3.

    Raises: OutOfMemory: if the copy or the forward of a batch does not fit into memory.
    """
    with evaluating(engine):
        task, forward = engine.task, engine.deepspeed
        if engine.stage < 3 and engine.config["bf16"]["enabled"]:
            with building_in_memory(subject="a float32 copy of the model for an evaluation is"):
                task = forward = partition.build(
                    make_task, engine.config, partitioned=False, seed=0
                )
                tensors = dict(task.named_parameters()) | partition.running_statistics(task)
                for name, values in whole_masters(engine):
                    tensors[name].copy_(values.view_as(tensors[name]))
                task.to(distributed.device()).eval()

        def measured(images: Tensor, targets: Any) -> Any:
            with out_of_memory_named(len(images)):
                return forward(**task.prepare(images, targets, None))

        yield measured

"""What one task brings to a run: samples, a Module, micro batches, an evaluation.

The engine builds, trains, stores and resumes any task through this face;
`fd_large/tasks/registry.py` says which recipe has which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fd_large.data.loader import Batch
from fd_large.data.source import ImageSource
from fd_large.engine.ema import Ema
from fd_large.engine.student import Precision, student_weights
from fd_large.engine.task import Task
from fd_large.engine.zero.engine import Engine
from fd_large.errors import ConfigError
from fd_large.recipes.run import Run

Evaluate = Callable[[int, bool, Callable[[], None]], tuple[dict[str, float], dict[str, Any] | None]]
"""(update, whether for the last time, called between batches) -> numbers by name, and arrays to
draw where some are due; called by all ranks alike."""


class Portion(NamedTuple):
    """Which micro batches of an epoch a rank wants.

    Attributes:
        epoch: Counted from 0.
        first_update: Of this epoch, where a resumed run goes on.
        micro_batch_size: Images a batch.
        rank: Counted from 0.
        world_size: The number of ranks.
    """

    epoch: int
    first_update: int
    micro_batch_size: int
    rank: int
    world_size: int


class Job:
    """A task as a run needs it; made anew once the recipe is settled.

    The engine calls, in this order: `open_samples` and `check` (no collective, nothing heavy: the
    user's mistakes end here), `stage`, `build`, then `make_task` as often as it likes.

    Attributes:
        run: The settled recipe.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    def open_samples(self) -> ImageSource:
        """Opens the training samples; a target is found by the same number.

        Raises: DataError or ConfigError: if they cannot be used.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Finds mistakes in what else the task reads: headers of weights, held-out samples.

        Raises: FDError: the user's mistake.
        """
        student_weights(self.run)

    def refuse(self, idle: Iterable[str]) -> None:
        """Lets nobody set what does nothing.

        Args:
            idle: Fields of a recipe, section.field, that mean nothing to this task.

        Raises: ConfigError: if one of them is not as it is by default.
        """
        usual = Run(name="", student=self.run.student)
        for name in idle:
            section, _, field = name.partition(".")
            given, default = (getattr(getattr(r, section), field) for r in (self.run, usual))
            if given != default:
                raise ConfigError(
                    f"{name}: {self.run.task.name} does not use it; got {given!r}, expected "
                    f"{default!r}. Leave it out."
                )

    def stage(self, samples: ImageSource) -> ImageSource:
        """Puts samples on the nodes' own disks where the recipe wants it; a collective.

        Raises: ConfigError: if it wants that and the task cannot.
        """
        if self.run.data.stage_to:
            raise ConfigError(
                "data.stage_to: only images without labels are copied; got "
                f"{self.run.data.stage_to!r} for the task {self.run.task.name}, expected nothing. "
                "Copy the data set to every node, and set --data.root."
            )
        return samples

    def parameter_sizes(self) -> tuple[int, ...]:
        """Elements of each tensor that an engine will split, without memory for them."""
        with torch.device("meta"):
            return tuple(parameter.numel() for parameter in self.make_task().parameters())

    def build(self, precision: Precision, *, node_size: int, persistence_threshold: int) -> None:
        """Builds what the task uses and does not train; a collective."""

    def make_task(self) -> Task:
        """Constructs the Module, with random weights from torch's global generator only."""
        raise NotImplementedError

    def initial_weights(self) -> Iterable[tuple[str, Tensor]] | None:
        """(name, full tensor) of `task.student`, on every rank; None: random ones stay."""
        return student_weights(self.run)

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """The micro batches of a rank from a step of an epoch to its end."""
        raise NotImplementedError

    def probe_batch(self, size: int) -> Batch:
        """A made-up micro batch of the largest images that training will see."""
        raise NotImplementedError

    def evaluation(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int, ema: Ema | None
    ) -> Evaluate | None:
        """What is measured before, during and after training; None: nothing. A collective."""
        return None

    def evaluate_every(self) -> int:
        """Steps between two calls of what `evaluation` returns; 0: at the start and the end."""
        return self.run.eval.every

    def facts(self) -> Mapping[str, Any]:
        """What a checkpoint's manifest tells of the task, besides."""
        return {}

    def checks(self) -> Mapping[str, Callable[[], Any]]:
        """What the canary may ask for (`teacher_shard`, `teacher_map`); nothing: it rests."""
        return {}

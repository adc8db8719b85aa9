"""What one task brings to a run: samples, a Module, micro batches, evaluations, hooks.

The engine builds, trains, stores and resumes any task through this face and knows none;
`fd_large/tasks/registry.py` says which recipe has which.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.data.loader import Batch
from fd_large.data.sampler import Portion
from fd_large.data.source import ImageSource
from fd_large.engine.evaluation import Evaluation
from fd_large.engine.student import student_weights
from fd_large.engine.task import Task
from fd_large.engine.zero.engine import Engine
from fd_large.errors import ConfigError
from fd_large.plan.flops import StepFlops
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.run import Run
from fd_large.recipes.sections import FrozenModel
from fd_large.runtime.hooks import Hook
from fd_large.weights.settle import settle_student
from fd_large.weights.source import Sources


class StoredStudent(NamedTuple):
    """How the checkpoint of a run gives its student back.

    Attributes:
        architecture: The student's, with the image size that its windows and tables are for.
        absent: Value of each of its tensors that the task did without.
        statistics: The normalisation that it was trained with.
    """

    architecture: FamilyArchitecture
    absent: Mapping[str, float]
    statistics: Statistics


class FrozenPart(NamedTuple):
    """A model that a run uses and does not train.

    Attributes:
        section: The recipe's section that describes it.
        image_size: Side to which the run's images are resized for it; 0: see `frozen_maker`.
    """

    section: FrozenModel
    image_size: int


class Job:
    """A task as a run needs it; made anew once the recipe is settled.

    The engine calls, in this order: `open_samples` and `check` (no collective, nothing heavy: the
    user's mistakes end here), `stage`, `build`, then `make_task` as often as it likes.

    Attributes:
        run: The settled recipe.
        weights: Opens the weights that the recipe names, or has opened them.
    """

    metrics: ClassVar[Mapping[str, str]] = {}
    """What logs and reports call the numbers of an evaluation, in the order of showing:
    "SET/METRIC" -> words. On disk the name is SET_METRIC. What is not listed is recorded and not
    shown. SET/best_constant is the loss of the constant-prediction baseline of SET/loss; "loss" is
    the training loss."""
    memory_remedy = ""
    """What else saves memory where the task's models do not fit, as a flag; empty: nothing."""
    learns_from_images_alone = False
    """Whether the images of a step are all that its loss needs, so that it can be replayed."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.weights = Sources()

    def settle(self, sources: Sources) -> Run:
        """Returns the recipe with what its weights decide: models, windows, statistics.

        Reads headers only; a settled recipe is settled again without change.

        Raises: WeightsError, ConfigError: if weights do not fit what the recipe says.
        """
        return replace(self.run, student=settle_student(self.run.student, sources))

    def open_samples(self) -> ImageSource:
        """Opens the training samples; a target is found by the same number.

        Raises: DataError or ConfigError: if they cannot be used.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Finds mistakes in what else the task reads: headers of weights, held-out samples.

        Raises: FDError: the user's mistake.
        """
        self.initial_weights()

    def refuse(self, ignored: Iterable[str]) -> None:
        """Refuses fields that this task ignores: what is set and does nothing would mislead.

        Args:
            ignored: Fields of a recipe, section.field.

        Raises: ConfigError: if one of them is not as it is by default.
        """
        usual = Run(name="", student=self.run.student)
        for name in ignored:
            section, _, field = name.partition(".")
            given, default = (getattr(getattr(r, section), field) for r in (self.run, usual))
            if given != default:
                raise ConfigError(
                    f"{name}: {self.run.task.name} ignores this field; got {given!r}, expected "
                    f"{default!r}. Leave it out."
                )

    def sources(self) -> Mapping[str, str]:
        """Returns the sources of weights by the field that names them, as the recipe has them."""
        return {"student.init": self.run.student.init}

    def stage(self, samples: ImageSource) -> ImageSource:
        """Copies samples to the nodes' own disks where the recipe wants it; a collective.

        Raises: ConfigError: if it wants that and the task cannot.
        """
        if self.run.data.stage_to:
            raise ConfigError(
                "data.stage_to: only images without labels are copied; got "
                f"{self.run.data.stage_to!r} for the task {self.run.task.name}, expected nothing. "
                "Copy the dataset to every node, and set --data.root."
            )
        return samples

    def parameter_sizes(self) -> tuple[int, ...]:
        """Returns the elements of each tensor that an engine may split, without memory for them."""
        with torch.device("meta"):
            return tuple(parameter.numel() for parameter in self.make_task().parameters())

    def splits_models(self) -> bool:
        """Whether a model beside the student is split over ranks, whatever the ZeRO stage."""
        return False

    def memory_facts(self) -> Mapping[str, Any]:
        """Returns what decides the memory of a step besides the student's own fields, by name."""
        return {}

    def step_flops(self, micro_batch_size: int, *, attention_recomputed: bool) -> StepFlops | None:
        """Returns the FLOPs of a micro-batch on one rank; None if they are not known beforehand."""
        return None

    def build(self, *, bfloat16: bool, node_size: int, persistence_threshold: int) -> None:
        """Builds what the task uses and does not train; a collective.

        Args:
            bfloat16: Whether the student computes in bfloat16.
            node_size: Ranks of a node.
            persistence_threshold: Tensors of at most so many elements stay whole where a model is
                split.
        """

    def make_task(self) -> Task:
        """Constructs the Module, with random weights from torch's global generator only."""
        raise NotImplementedError

    def initial_weights(self) -> Iterable[tuple[str, Tensor]] | None:
        """Returns (name, full tensor) of `task.student`, on every rank; None for random ones.

        Raises: WeightsError: if `student.init` does not fit the student.
        """
        return student_weights(self.run.student, self.weights, image_size=self.run.data.image_size)

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """Yields the micro batches of a rank from a step of an epoch to its end."""
        raise NotImplementedError

    def probe_batch(self, size: int) -> Batch:
        """Makes up a micro batch of the largest images that training will see."""
        raise NotImplementedError

    def evaluations(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int
    ) -> Sequence[Evaluation]:
        """Returns what is measured before, during and after training; a collective."""
        return ()

    def hooks(self) -> Sequence[Hook]:
        """Returns the hooks that watch what this task alone has; asked after `build`."""
        return ()

    def summary(self) -> Mapping[str, Any]:
        """Returns the first entries of summary.json."""
        frozen = {
            name: {"model": part.section.model, "source": part.section.source}
            for name, part in self.frozen_models().items()
        }
        own = {"recipe": self.run.name, "student": self.run.student.model}
        return {**own, "teacher": None, **frozen}  # The key is there for every task.

    def facts(self) -> Mapping[str, Any]:
        """Returns what a checkpoint's manifest says of the task, JSON-safe."""
        return {}

    def check_stored(self, manifest: Mapping[str, Any]) -> None:
        """Refuses a checkpoint that belongs to another training than this.

        Args:
            manifest: The checkpoint's, with the `facts` of its task.

        Raises: CheckpointError: naming what differs.
        """

    def stored_student(self) -> StoredStudent:
        """Returns how a checkpoint of this run gives its student back; builds nothing."""
        return StoredStudent(trained_at(self.run), {}, IMAGENET)

    def frozen_models(self) -> Mapping[str, FrozenPart]:
        """Returns the models that the run uses and does not train, by name (RUN#name)."""
        return {}

    def in_one_process(self) -> Run:
        """Returns the recipe as a single process runs it: nothing is split over ranks."""
        return self.run


def trained_at(run: Run) -> FamilyArchitecture:
    """Returns the student's architecture with the image size that its tables are for."""
    return run.student_architecture().at(run.data.image_size)

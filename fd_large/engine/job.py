"""The interface by which the engine asks a task for samples, a Module, batches, evaluations.

The engine builds, trains, stores and resumes any task through this interface, and imports no task.
This interface is the first of a task's three interfaces (`fd_large/recipes/task_kind.py`), and the
only one that every task has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn

from fd_large.backbones.custom.custom import check_map
from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.data.image_sizes import ImageSizes
from fd_large.data.labelled import open_training
from fd_large.data.loader import Batch, ViewBatches, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.source import ImageSource, open_images
from fd_large.data.views import ViewSettings
from fd_large.engine.evaluation import Evaluation
from fd_large.engine.student import check_layers, make_student, student_weights
from fd_large.engine.task import Task
from fd_large.engine.zero.engine import Engine, InitialWeights
from fd_large.errors import ConfigError
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.fields import flat
from fd_large.recipes.run import Run
from fd_large.recipes.sections import FrozenModel
from fd_large.runtime.hooks import Hook
from fd_large.weights.resolve import Sources
from fd_large.weights.settle import settle_student

# Keys that summary.json has for every task, null where a task has no such number.
_FOR_EVERY_TASK = ("held_out_loss_start", "held_out_loss", "held_out_cosine", "loss_best_constant")


class StoredStudent(NamedTuple):
    """The student that a checkpoint of a run holds.

    Attributes:
        architecture: The student's architecture, with the image size of its position tables.
        absent: {name: fill value} of the tensors that the task left out of its student, so that the
            checkpoint lacks them.
        statistics: The normalisation that the student was trained with.
    """

    architecture: FamilyArchitecture
    absent: Mapping[str, float]
    statistics: Statistics


class FrozenPart(NamedTuple):
    """A model that a run uses and does not train.

    Attributes:
        section: The recipe's section that describes the model.
        image_size: Side to which the run's images are resized for the model, in pixels. With 0 the
            images keep their size, or have the only side that the model's table of positions
            allows.
    """

    section: FrozenModel
    image_size: int


class TensorSizes(NamedTuple):
    """Element counts of the trained tensors, and of the frozen ones that ZeRO-3 may shard."""

    trained: tuple[int, ...]
    frozen: tuple[int, ...]


class TrainingJob:
    """A task's part in a training run, described by the run's recipe.

    The engine calls `settle`, and constructs a new job from the recipe that `settle` returns. On
    the new job it calls `open_samples` and `check`, which raise errors for the user's mistakes,
    without a collective and without a model in memory. It then calls `build`, and after that
    `make_task` any number of times.

    Attributes:
        run: The recipe.
        weights: The sources that open the weights that the recipe names; each file is opened once.
        between_batches: Function that a task calls on all ranks between the batches of its work
            before an epoch, such as storing a teacher's maps. An error that it raises ends this
            work.
    """

    metrics: ClassVar[Mapping[str, str]] = {}
    """{"SET/METRIC": label} of an evaluation's numbers that logs and reports show, in their order.
    On disk such a number has the name SET_METRIC. Numbers that are not listed are recorded but not
    shown. SET/best_constant is the SET/loss of the best constant prediction; "loss" is the training
    loss."""
    lower_is_better: ClassVar[tuple[str, ...]] = ("loss",)
    """The METRICs (see `metrics`) for which lower is better; for all others, higher is better."""
    memory_remedy: ClassVar[str] = ""
    """A flag that saves memory if the task's models do not fit; "" if there is none."""
    learns_from_images_alone: ClassVar[bool] = False
    """Whether a step can be replayed from its images alone, without targets. `diagnose` assumes
    that the student of a task that needs targets has learnt labels."""
    ignored_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of a recipe, section.field, that this task ignores. A recipe that sets such a field is
    refused, since the field would have no effect."""
    remedies: Mapping[str, str] = MappingProxyType({})
    """Remedies for ignored fields that should not simply be left out, by field."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.weights = Sources()
        self.between_batches: Callable[[], None] = lambda: None

    def settle(self, sources: Sources) -> Run:
        """Returns the recipe with those fields set that the weights decide.

        These are the fields of the models, such as attention windows, and the image statistics.
        `sources` opens the weights; only headers of files are read. Another call does not change a
        recipe that `settle` has returned.

        Raises: WeightsError or ConfigError: if weights do not fit the recipe.
        """
        return replace(self.run, student=settle_student(self.run.student, sources))

    def open_samples(self) -> ImageSource:
        """Opens the training samples: the images of `data.root`, unless the task needs others.

        Raises: DataError or ConfigError: if the samples cannot be used.
        """
        data = self.run.data
        if data.val_fraction:
            return open_training(data.root, val_fraction=data.val_fraction)
        return open_images(data.root)

    def check(self) -> None:
        """Checks the recipe's fields and the task's other inputs, such as headers of weights.

        Raises: FDError: if an ignored field is set, or an input does not fit the recipe.
        """
        several = {name: type(entry)() for name, entry in self.run.teachers.items()}
        usual = flat(Run(name=self.run.name, student=self.run.student, teachers=several))
        values = flat(self.run)
        for name in self.ignored_fields:
            value, default = values[name], usual[name]
            if value != default:
                raise ConfigError(
                    f"{name}: unused in this recipe; got {value!r}, expected "
                    f"{default!r}. " + self.remedies.get(name, "Leave out this field.")
                )
        is_own, size = bool(self.run.student_architecture().code), self.run.data.image_size
        if is_own or self.run.optim.layer_decay != 1.0:
            with torch.device("meta"):
                student = make_student(self.run.student, image_size=size)
            if is_own:
                check_map(student, size, is_trained=True, where="student.model")
            if self.run.optim.layer_decay != 1.0:
                check_layers(student)
        self.initial_weights()

    def sources(self) -> Mapping[str, str]:
        """Returns the sources of the weights that the recipe names, by field."""
        return {"student.init": self.run.student.init}

    def tensor_sizes(self) -> TensorSizes:
        """Returns the element counts of the tensors that ZeRO-3 may shard; allocates no tensor."""
        with torch.device("meta"):
            return TensorSizes(sizes_of(self.make_task()), ())

    def memory_facts(self) -> Mapping[str, Any]:
        """Returns those facts about the task that decide a step's memory, by name; JSON-safe.

        The engine itself adds the recipe's section `student`.
        """
        return {}

    def build(self, *, bfloat16: bool, node_size: int, persistence_threshold: int) -> None:
        """Builds the models that the task uses and does not train; all ranks must call this method.

        Args:
            bfloat16: Whether the student computes in bfloat16.
            node_size: Number of ranks per node.
            persistence_threshold: Tensors with at most this many elements stay whole if a model
                is sharded.
        """

    def take_models_of(self, other: TrainingJob) -> None:
        """Takes over the models of another student's job of this class, instead of `build`."""

    def make_task(self) -> Task:
        """Constructs the trained Module, with random weights from torch's global generator only."""
        raise NotImplementedError

    def models_on_shapes(self) -> tuple[Task, tuple[nn.Module, ...]]:
        """Constructs the task and its frozen models on the meta device, for counts.

        `build`, weights and samples are not needed.
        """
        return self.make_task(), ()

    def initial_weights(self) -> InitialWeights:
        """Returns the weights of those modules of the task that do not start at random.

        Raises: WeightsError: if `student.init` does not fit the student.
        """
        tensors = student_weights(
            self.run.student,
            self.weights,
            image_size=self.run.data.image_size,
            without=self.stored_student().absent,
        )
        return {} if tensors is None else {"student": tensors}

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """Yields a rank's micro batches, from the step that `portion` names to the epoch's end.

        By default a batch has one random view of each image, and no targets. `portion` has the
        epoch, its first step to take, the micro batch size, and the rank.
        """
        run = self.run
        return iter(
            build_loader(
                self.view_batches(samples, portion.epoch),
                len(samples),
                portion,
                global_batch_size=run.batch.global_batch_size,
                workers=run.data.workers,
            )
        )

    def view_batches(self, samples: ImageSource, epoch: int) -> ViewBatches:
        """Returns the dataset that makes the batches of views of an epoch, counted from 0."""
        run = self.run
        return ViewBatches(
            samples,
            self.view_settings(),
            run.runtime.seed,
            epoch,
            mixed_among=run.batch.global_batch_size if run.data.image_mixup else 0,
            sizes=ImageSizes(run.data.sides, run.runtime.seed, run.batch.global_batch_size)
            if run.data.image_sizes
            else None,
        )

    def view_settings(self) -> ViewSettings:
        """Returns the recipe's settings of the views."""
        data = self.run.data
        return ViewSettings(
            data.image_size,
            data.min_crop_scale,
            data.max_pixels,
            data.color_jitter,
            data.grayscale_probability,
        )

    def probe_batch(self, size: int) -> Batch:
        """Makes a batch of `size` images, grey by default, of the largest side in training."""
        side, positions = max(self.run.data.sides), torch.arange(size)
        images = torch.full((size, 3, side, side), 128, dtype=torch.uint8)
        return Batch(images, 0, positions, positions)

    def images_together(self) -> int:
        """Returns the number of images that the task uses together, such as those of a mosaic.

        Micro batches should be multiples of it.
        """
        return 1

    def norm_group(self) -> int:
        """Returns the number of images that share statistics of the student's batch norms.

        It is 0 if the task trains no batch norm; then any micro batch size is valid.
        """
        return self.run.norm_batch()

    def evaluations(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int
    ) -> Sequence[Evaluation]:
        """Returns the evaluations to make before, during and after training.

        All ranks must call this method. `micro_batch_size` is the number of images per rank and
        forward.
        """
        return ()

    def hooks(self) -> Sequence[Hook]:
        """Returns the task's own hooks; called after `build`."""
        return ()

    def summary(self) -> Mapping[str, Any]:
        """Returns the entries of summary.json that describe the recipe and its models."""
        frozen = {
            name: {"model": part.section.model, "source": part.section.source}
            for name, part in self.frozen_models().items()
        }
        first_entries = {"recipe": self.run.name, "student": self.run.student.model}
        return {**first_entries, "teacher": None, **frozen}  # The key is there for every task.

    def evaluated(self, first: Mapping[str, float], last: Mapping[str, float]) -> Mapping[str, Any]:
        """Returns the entries of summary.json that come from evaluations.

        `first` has the numbers of the first evaluation, and `last` the newest value of each, by
        name.
        """
        return {**dict.fromkeys(_FOR_EVERY_TASK), **last}

    def facts(self) -> Mapping[str, Any]:
        """Returns the task's entries of a checkpoint's manifest, which must be JSON-safe."""
        return {}

    def check_stored(self, manifest: Mapping[str, Any]) -> None:
        """Refuses a checkpoint that belongs to another training.

        Its manifest contains the `facts` of the job that wrote it.

        Raises: CheckpointError: if the trainings differ; the message names what differs.
        """

    def stored_student(self) -> StoredStudent:
        """Returns a description of the student in this run's checkpoints; builds nothing."""
        return StoredStudent(trained_at(self.run), {}, IMAGENET)

    def frozen_models(self) -> Mapping[str, FrozenPart]:
        """Returns the models that the run uses and does not train, by name (as in RUN#name)."""
        return {}


Job = TrainingJob
"""The name of `TrainingJob` in earlier versions, which tasks of the user's own may import."""

JobOf = Callable[[Run | Mapping[str, Any]], TrainingJob]
"""Makes the job of a recipe, or of its form in recipe.json and manifests."""


def trained_at(run: Run) -> FamilyArchitecture:
    """Returns the student's architecture in `run`, with the image size of its position tables."""
    return run.student_architecture().at(run.data.image_size)


def sizes_of(*models: nn.Module) -> tuple[int, ...]:
    """Returns the number of elements of each parameter of `models`, in one tuple."""
    return tuple(parameter.numel() for model in models for parameter in model.parameters())

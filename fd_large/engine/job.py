"""What one task brings to a run: samples, a Module, micro batches, evaluations, hooks.

The engine builds, trains, stores and resumes any task through this face and knows none;
`fd_large/tasks/registry.py` says which recipe has which.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fd_large.backbones.custom.custom import check_map
from fd_large.backbones.exports import Export
from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.checkpoint.read import Reader
from fd_large.checkpoint.stream import Shape
from fd_large.data.image_sizes import ImageSizes
from fd_large.data.labelled import open_training
from fd_large.data.loader import Batch, ViewBatches, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.source import ImageSource, open_images
from fd_large.data.staging import stage
from fd_large.data.views import ViewSettings
from fd_large.engine.evaluation import Evaluation
from fd_large.engine.predictions import Predictions
from fd_large.engine.student import (
    OWN_FIELDS,
    as_student,
    make_student,
    refuse_decided,
    student_weights,
)
from fd_large.engine.task import Task
from fd_large.engine.zero.engine import Engine
from fd_large.errors import ConfigError
from fd_large.recipes.architectures import resolve
from fd_large.recipes.family import FamilyArchitecture, WindowedTransformer
from fd_large.recipes.fields import flat
from fd_large.recipes.run import Run
from fd_large.recipes.sections import FrozenModel, Student
from fd_large.runtime.hooks import Hook
from fd_large.weights.export import export_of
from fd_large.weights.libraries import LIBRARIES, To
from fd_large.weights.model_card import LOSSES, ExportedStudent, Learned, card
from fd_large.weights.settle import settle_student
from fd_large.weights.source import Sources

# Keys that summary.json has for every task, null where a task has no such number.
_FOR_EVERY_TASK = ("held_out_loss_start", "held_out_loss", "held_out_cosine", "loss_best_constant")

_WINDOW = "architecture.window_size"
_OF_THE_MODEL = {"model", "init", "init_allow"}


class StoredStudent(NamedTuple):
    """The student that a checkpoint of a run holds.

    Attributes:
        architecture: The student's architecture, with the image size that its tables are for.
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


class StoredScores(NamedTuple):
    """What came out of scoring a stored run.

    Attributes:
        tables: Tables for the terminal.
        files: Files that were written.
    """

    tables: Sequence[Any]
    files: Sequence[Path]


class Predicted(NamedTuple):
    """What a stored run sees in an image.

    Attributes:
        path: The image file.
        text: What was seen, in a few words.
        drawn: The drawn image; None if it could not be read.
        problem: Why the image could not be read; empty: it was.
    """

    path: str
    text: str = ""
    drawn: Path | None = None
    problem: str = ""


class Job:
    """What one task brings to a run; made again once the recipe is settled.

    The engine calls `settle`, then `open_samples` and `check` (nothing heavy and no collective: the
    user's mistakes end here), `stage`, `build`, and then `make_task` as often as it likes.

    Args:
        run: The recipe.

    Attributes:
        run: The recipe.
        weights: The sources that open the recipe's weights, each once.
        between_batches: Called between batches of what a job does before an epoch, on all ranks
            alike; may raise to leave.
    """

    metrics: ClassVar[Mapping[str, str]] = {}
    """What logs and reports call the numbers of an evaluation, in the order of showing:
    "SET/METRIC" -> words. On disk the name is SET_METRIC. Numbers that are not listed are recorded
    but not shown. SET/best_constant is the constant-prediction baseline of SET/loss; "loss" is the
    training loss."""
    lower_is_better: ClassVar[tuple[str, ...]] = ("loss",)
    """The METRICs of which less is better; of the others more is."""
    memory_remedy: ClassVar[str] = ""
    """A flag that saves memory if the task's models do not fit; empty: there is none."""
    learns_from_images_alone: ClassVar[bool] = False
    """Whether a step can be replayed from its images alone, without targets. `diagnose` takes the
    student of a task that needs targets for one that learnt labels."""
    loss_name: ClassVar[str] = ""
    """What `diagnose` calls the loss of a stored run (`losses_on`); empty: neither images alone nor
    images with a class each decide it."""
    ignored_fields: ClassVar[tuple[str, ...]] = ()
    """Fields of a recipe, section.field, that this task ignores. Setting one would mislead, and is
    refused."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.weights = Sources()
        self.between_batches: Callable[[], None] = lambda: None

    def settle(self, sources: Sources) -> Run:
        """Returns the recipe completed from its weights: models, windows, statistics.

        Reads headers only. Settling a settled recipe changes nothing.

        Args:
            sources: Opens the weights.

        Raises: WeightsError or ConfigError: if weights do not fit the recipe.
        """
        return replace(self.run, student=settle_student(self.run.student, sources))

    def open_samples(self) -> ImageSource:
        """Opens the training samples: the images of `data.root`, unless the task needs others.

        Raises: DataError or ConfigError: if they cannot be used.
        """
        data = self.run.data
        if data.val_fraction:
            return open_training(data.root, val_fraction=data.val_fraction)
        return open_images(data.root)

    def check(self) -> None:
        """Refuses ignored fields; checks what else the task reads, such as headers of weights.

        Raises: FDError: for the user's mistake.
        """
        several = {name: type(entry)() for name, entry in self.run.teachers.items()}
        usual = flat(Run(name=self.run.name, student=self.run.student, teachers=several))
        own = flat(self.run)
        for name in self.ignored_fields:
            given, default = own[name], usual[name]
            if given != default:
                raise ConfigError(
                    f"{name}: nothing in this recipe reads it; got {given!r}, expected "
                    f"{default!r}. Leave it out."
                )
        is_own, size = bool(self.run.student_architecture().code), self.run.data.image_size
        if is_own or self.run.optim.layer_decay != 1.0:
            with torch.device("meta"):
                student = make_student(self.run.student, image_size=size)
            if is_own:
                check_map(student, size, is_trained=True, where="student.model")
            if self.run.optim.layer_decay != 1.0:
                student.layer_id(next(name for name, _ in student.named_parameters()))
        self.initial_weights()
        self.initial_heads()

    def sources(self) -> Mapping[str, str]:
        """Returns the sources of the weights that the recipe names, by field."""
        return {"student.init": self.run.student.init}

    def stage(self, samples: ImageSource) -> ImageSource:
        """Copies samples to the nodes' own disks if the recipe sets `data.stage_to`; a collective.

        Raises: DataError or ConfigError: if that is not possible.
        """
        return stage(samples, self.run.data.stage_to)

    def parameter_sizes(self) -> tuple[int, ...]:
        """Returns the number of elements of each tensor that may be split; allocates none."""
        return self._sizes_of_task

    def trained_sizes(self) -> tuple[int, ...]:
        """Returns the number of elements of each trained tensor; allocates none."""
        return self._sizes_of_task

    @cached_property
    def _sizes_of_task(self) -> tuple[int, ...]:
        with torch.device("meta"):
            return tuple(parameter.numel() for parameter in self.make_task().parameters())

    def splits_models(self) -> bool:
        """Returns whether a model beside the student is sharded, whatever the ZeRO stage."""
        return False

    def memory_facts(self) -> Mapping[str, Any]:
        """Returns what else decides the memory of a step, besides the student's fields, by name."""
        return {}

    def build(self, *, bfloat16: bool, node_size: int, persistence_threshold: int) -> None:
        """Builds what the task uses and does not train; a collective.

        Args:
            bfloat16: Whether the student computes in bfloat16.
            node_size: Number of ranks per node.
            persistence_threshold: Tensors of at most so many elements stay whole if a model is
                sharded.
        """

    def take_models_of(self, other: Job) -> None:
        """Takes what the job of another student of the same recipe has built, in place of `build`.

        Args:
            other: A job of this class.
        """

    def make_task(self) -> Task:
        """Constructs the trained Module, with random weights from torch's global generator only."""
        raise NotImplementedError

    def models_on_shapes(self) -> tuple[Task, tuple[nn.Module, ...]]:
        """Constructs the task and the frozen models that it uses, on the meta device, for counting.

        Needs no `build`, no weights and no samples.
        """
        return self.make_task(), ()

    def initial_weights(self) -> Iterable[tuple[str, Tensor]] | None:
        """Returns (name, full tensor) of `task.student`, on every rank; None for random weights.

        Raises: WeightsError: if `student.init` does not fit the student.
        """
        return student_weights(self.run.student, self.weights, image_size=self.run.data.image_size)

    def initial_heads(self) -> Mapping[str, Iterable[tuple[str, Tensor]]]:
        """Returns (name, full tensor) of other modules of the task that do not start at random.

        By the module's name, on every rank.

        Raises: WeightsError: if they do not fit the task.
        """
        return {}

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """Yields a rank's micro batches from a step of an epoch to the epoch's end.

        One random view of each image, without targets, unless the task needs something else.
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
        """Returns what loads the views of an epoch."""
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
        """Returns how the recipe makes an image a view."""
        data = self.run.data
        return ViewSettings(
            data.image_size,
            data.min_crop_scale,
            data.max_pixels,
            data.color_jitter,
            data.grayscale_probability,
        )

    def probe_batch(self, size: int) -> Batch:
        """Makes a batch of so many of the largest images that training may see; grey ones here."""
        side, positions = max(self.run.data.sides), torch.arange(size)
        images = torch.full((size, 3, side, side), 128, dtype=torch.uint8)
        return Batch(images, 0, positions, positions)

    def images_together(self) -> int:
        """Returns of how many images the loaded ones are a multiple, whatever the micro batch."""
        return 1

    def evaluations(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int
    ) -> Sequence[Evaluation]:
        """Returns what is measured before, during and after training; a collective."""
        return ()

    def hooks(self) -> Sequence[Hook]:
        """Returns the task's own hooks; called after `build`."""
        return ()

    def summary(self) -> Mapping[str, Any]:
        """Returns the first entries of summary.json."""
        frozen = {
            name: {"model": part.section.model, "source": part.section.source}
            for name, part in self.frozen_models().items()
        }
        own = {"recipe": self.run.name, "student": self.run.student.model}
        return {**own, "teacher": None, **frozen}  # The key is there for every task.

    def evaluated(self, first: Mapping[str, float], last: Mapping[str, float]) -> Mapping[str, Any]:
        """Returns the entries of summary.json that evaluations make.

        Args:
            first: Numbers of the first evaluation, by name.
            last: The newest number of every name.
        """
        return {**dict.fromkeys(_FOR_EVERY_TASK), **last}

    def facts(self) -> Mapping[str, Any]:
        """Returns the task's entries of a checkpoint's manifest, JSON-safe."""
        return {}

    def check_stored(self, manifest: Mapping[str, Any]) -> None:
        """Refuses a checkpoint that belongs to another training.

        Args:
            manifest: The checkpoint's manifest, which contains the `facts` of its job.

        Raises: CheckpointError: naming what differs.
        """

    def classes(self) -> tuple[str, ...] | None:
        """Returns the names of the classes that targets are numbers of; None: they are not classes.

        Raises: FDError: if the images that show them are gone.
        """
        return None

    def losses_on(
        self, task: Task, images: Tensor, labels: Tensor | None
    ) -> Callable[[], Mapping[str, float]]:
        """Returns a function that computes the loss on given images, and what else belongs to it.

        It does so with the weights as they are when it is called; of the frozen models' work what
        can be done once is done here.

        Args:
            task: This job's, in evaluation mode.
            images: (B, 3, S, S) uint8, on the device.
            labels: (B,) int64, numbers of `classes`, on the device; None where there are none.

        Returns: a function that returns {words: value}, `loss_name` first.
        """
        prepared = task.prepare(images, labels, None)
        return lambda: {self.loss_name: task(**prepared)[0].item()}

    def stored_student(self) -> StoredStudent:
        """Returns what describes the student in this run's checkpoints; builds nothing."""
        return StoredStudent(trained_at(self.run), {}, IMAGENET)

    def exported_into(self, architecture: FamilyArchitecture, to: To) -> Export | None:
        """Returns what the student, or the whole task, becomes in a library's files.

        Args:
            architecture: The student, with the image size of the export.
            to: The library.

        Returns: None for a graph, which takes any model.
        Raises: ConfigError: if the library has no such model.
        """
        if LIBRARIES[to].heads:
            able = ", ".join(f"--to {form}" for form, it in LIBRARIES.items() if not it.heads)
            raise ConfigError(
                f"export: --to {to}: holds a model with its heads; got a run of the task "
                f"{self.run.task.name}, expected one whose heads it has. Use one of {able}."
            )
        return self.student_into(architecture, to)

    def student_into(self, architecture: FamilyArchitecture, to: To) -> Export | None:
        """Returns what the student alone becomes; see `exported_into`."""
        student = self.run.student
        pads = student.size_rule == "pad"
        return export_of(architecture, to, pads=pads, window_rule=student.window_rule)

    def exported_beside(
        self, reader: Reader, student: Mapping[str, Shape], to: To
    ) -> Mapping[str, Shape]:
        """Returns the tensors of the task that are exported beside the student's.

        Args:
            reader: The checkpoint that is exported.
            student: Shapes of the student's tensors by their own names.
            to: The library.

        Returns: their shapes, by their names in the checkpoint.
        Raises: CheckpointError: if the checkpoint is not of this recipe's models.
        """
        return {}

    def stored_heads(self, reader: Reader) -> Mapping[str, nn.Module]:
        """Returns heads of a stored run that guess models beside the student, by name.

        Each maps the student and its normalised pixels to a FeatureMap.

        Args:
            reader: A checkpoint of the run.
        """
        return {}

    def export_heads(self, reader: Reader, folder: Path, shard_size: int) -> None:
        """Writes the heads of `stored_heads` beside an exported student, if there are any.

        Args:
            reader: The checkpoint that is exported.
            folder: Does not exist; what is written has a config.json that names the task.
            shard_size: Most bytes of a file of tensors.
        """

    @staticmethod
    def exported_heads(folder: Path) -> Mapping[str, nn.Module]:
        """Returns the heads that `export_heads` wrote, by name; see `stored_heads`.

        Raises: WeightsError: if the folder is damaged.
        """
        return {}

    def learned(self, manifest: Mapping[str, Any]) -> Learned:
        """Returns what the model card of an exported student says of the task.

        Args:
            manifest: The checkpoint's manifest.
        """
        metrics = {
            name.replace("/", "_"): what for name, what in self.metrics.items() if "/" in name
        }
        return Learned(
            title=f"the backbone of a {self.run.task.name} run",
            intro="An image backbone; the task's own heads are left out.",
            tag="image-feature-extraction",
            metrics=LOSSES | metrics,
        )

    def model_card(self, exported: ExportedStudent) -> str:
        """Returns the model card of an exported student, in Markdown."""
        return card(self.run.to_dict(), exported, self.learned(exported.manifest))

    def frozen_models(self) -> Mapping[str, FrozenPart]:
        """Returns the models that the run uses and does not train, by name (as in RUN#name)."""
        return {}

    def score_stored(self, reader: Reader, folder: Path) -> StoredScores:
        """Scores the model of a stored run on its test images; a collective.

        Args:
            reader: A checkpoint of the run.
            folder: Folder of the results, made if it is missing (`out_folder`); all ranks see it.

        Returns: tables and files, on rank 0.
        Raises: ConfigError: if the task does not score stored runs.
        """
        raise ConfigError(
            f"evaluate: the task {self.run.task.name} does not score a run by itself; got "
            f"{self.run.name}, expected a run of a task that does. Set --task knn."
        )

    @staticmethod
    def recipe_for(architecture: FamilyArchitecture, *, run_recipe: str | None) -> str:
        """Returns the name of the recipe by which a model is trained where the user names none.

        Args:
            architecture: The model's.
            run_recipe: Name of the recipe of the run whose student it is; "": it has random
                weights, without a run; None: it has weights of its own.
        """
        raise NotImplementedError

    def starting_from(
        self,
        model: FrozenModel,
        *,
        image_size: int,
        trained_as: Student | None,
        fields: Collection[str],
    ) -> Run:
        """Returns the recipe with a named model in the student's place.

        The window of its attention stays the recipe's, as does what the recipe says of images, but
        for rules that the model's family does not have. Blocks have position biases of their own
        where those of the recipe's student have.

        Args:
            model: The model and its weights, settled.
            image_size: Side of its images, in pixels.
            trained_as: The student's section in the run that trained the model; None: it is not a
                run's student.
            fields: Fields of the student that the user set in the recipe.

        Raises: ConfigError: if the user set a field that the named model decides.
        """
        base, own = self.run.student, self.run.student_architecture()
        decided = [f for f in fields if f in _OF_THE_MODEL or f.startswith("architecture.")]
        refuse_decided(decided, (*OWN_FIELDS, "size_rule", _WINDOW))
        architecture = resolve(model.model, model.architecture)
        if own == own.with_own_position_biases():
            architecture = architecture.with_own_position_biases()
        window = base.architecture.window_size
        # The windows of a Swin of the first version are those of its position tables.
        takes_window = architecture.has_stage_windows or _WINDOW in fields
        if window and takes_window and isinstance(architecture, WindowedTransformer):
            architecture = architecture.with_window(window)
        base = base.without_rules_unknown_to(architecture, kept=fields)
        student = as_student(model, architecture, base, trained_as=trained_as)
        return replace(self.run, student=student)

    @staticmethod
    def compared(summary: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
        """Returns what `evaluate` compares of a finished run.

        Args:
            summary: Content of its summary.json.

        Returns: the accuracy in per cent, and more about it.
        """
        raise NotImplementedError

    @staticmethod
    def predictions(run_dir: Path) -> Predictions | None:
        """Returns what a finished run predicted of its test images; None if it did not keep that.

        Args:
            run_dir: The run's folder.
        """
        raise NotImplementedError

    def predict(
        self, reader: Reader, images: Sequence[str], folder: Path, *, least_score: float
    ) -> Iterator[Predicted]:
        """Draws what the model of a stored run sees in images, and writes predictions.json.

        Args:
            reader: A checkpoint of the run.
            images: Paths of image files.
            folder: Folder of the results, made where it is missing (`out_folder`).
            least_score: Least score of an object that is drawn and written.

        Raises: ConfigError: if the task predicts nothing that can be drawn.
        """
        raise ConfigError(
            f"predict: the task {self.run.task.name} draws nothing; got {self.run.name}, expected "
            "a run of a task that finds something in images. python -m fd_large recipes lists them."
        )

    def in_one_process(self) -> Run:
        """Returns the recipe for a single process: no model is sharded."""
        return self.run


JobOf = Callable[[Run | Mapping[str, Any]], Job]
"""Makes the job of a recipe, or of what recipe.json and manifests hold of it."""


def trained_at(run: Run) -> FamilyArchitecture:
    """Returns the student's architecture with the image size that its tables are for."""
    return run.student_architecture().at(run.data.image_size)

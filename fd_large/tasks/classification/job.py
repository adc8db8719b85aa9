"""The jobs of fine-tuning and of the linear probe, which train and test on labelled images."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from fd_large.backbones.registry import statistics_of
from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.data.bad_images import BadCount, BadImages, agreed_error
from fd_large.data.centre_crops import NO_LABEL, CentralBatch, central_batches
from fd_large.data.few_labels import few_labels
from fd_large.data.labelled import LabelledImages, open_labelled, open_split
from fd_large.data.loader import Batch, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.source import ImageSource
from fd_large.data.views import ViewSettings
from fd_large.engine.evaluation import Evaluation, in_float32
from fd_large.engine.heads import check_head
from fd_large.engine.job import StoredStudent, TrainingJob, trained_at
from fd_large.engine.predictions import Predictions
from fd_large.engine.student import FINAL_NORM, make_student, student_weights
from fd_large.engine.task import Task
from fd_large.engine.zero import partition
from fd_large.engine.zero.engine import Engine, InitialWeights
from fd_large.engine.zero.fingerprint import fingerprint
from fd_large.errors import CheckpointError, ConfigError
from fd_large.ranks import activity, distributed
from fd_large.recipes.run import Run
from fd_large.runtime.hooks import Hook, Setting
from fd_large.tasks.classification.scores import averaged
from fd_large.tasks.classification.section import FINETUNE, LINEAR, METRICS
from fd_large.tasks.classification.task import (
    HEAD,
    FineTuning,
    Frozen,
    FrozenFeature,
    LinearProbing,
    probe_batch,
)
from fd_large.tasks.classification.views import GroupedBatches, LabelledViews, MixedBatches
from fd_large.weights.resolve import Sources

log = logging.getLogger(__name__)

IMAGENET_CLASSES = 1000


class ClassificationJob(TrainingJob):
    """Base class of jobs that train a classifier on labels of train/ and test it on val or test.

    A subclass's task returns a loss, and in evaluation the sums of `scores.summed`. The task's
    section of the recipe has the field `statistics`.
    """

    metrics: ClassVar = METRICS

    def open_samples(self) -> ImageSource:
        """Opens the training images.

        The recipe may restrict them to a fraction of the images or to a number of images of each
        class.
        """
        return self._training_images()

    def settle(self, sources: Sources) -> Run:
        """Returns the recipe, completed from the weights that `student.init` names.

        If the recipe states no image statistics, the result has the statistics of these weights. If
        `student.init` is empty, no statistics are filled in.

        Args:
            sources: Opens the weights.
        """
        run, init = super().settle(sources), self.run.student.init
        if own_section(self.run).statistics or not init:
            return run
        student = run.student_architecture()
        statistics = sources.resolve(init, where="--student.init").statistics_for(student)
        statistics = statistics or statistics_of(run.student.model, student)
        return with_statistics(run, (*statistics.mean, *statistics.std))

    def check(self) -> None:
        """Checks the recipe and the headers of the weights, and opens the test images."""
        super().check()
        self.test_images()

    def view_settings(self) -> ViewSettings:
        """Returns the recipe's settings of views, with bicubic resizing."""
        data = self.run.data
        return ViewSettings(
            data.image_size, data.min_crop_scale, data.max_pixels, interpolation="bicubic"
        )

    def models_on_shapes(self) -> tuple[Task, tuple[nn.Module, ...]]:
        """Constructs the task on the meta device, to count its operations.

        If the training images are not open yet, the task has 1,000 classes, as in ImageNet.

        Returns: the task, and an empty tuple, since the task uses no frozen models.
        """
        if self._training is None:
            self._assumed_classes = IMAGENET_CLASSES
        return super().models_on_shapes()

    def evaluations(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int
    ) -> Sequence[Evaluation]:
        """Returns a single evaluation, on all test images and exact on any number of ranks.

        Images that cannot be read are named in the log and do not count. The run ends if the
        fraction of such images exceeds `data.max_bad_fraction`.

        Args:
            engine: The task in its engine.
            samples: Not used.
            micro_batch_size: Number of images in a forward of a rank.
        """
        images, bad = self.test_images(), BadImages()

        def measure(
            step: int, last: bool, between: Callable[[], None]
        ) -> tuple[dict[str, float], None]:
            metrics, predictions = self._measure(engine, images, bad, micro_batch_size, between)
            if last and distributed.is_main():
                predictions.write(Path(self.run.run_dir()))
            return {f"test_{name}": value for name, value in metrics.items()}, None

        return [Evaluation(measure, self.run.eval.every)]

    def statistics(self) -> Statistics:
        """Returns the mean and deviation that normalise images.

        The result is the statistics of ImageNet, unless the recipe states others.
        """
        stated = own_section(self.run).statistics
        return Statistics(tuple(stated[:3]), tuple(stated[3:])) if stated else IMAGENET

    _assumed_classes = 0

    @property
    def num_classes(self) -> int:
        """Number of classes of the training images.

        If `models_on_shapes` ran before the training images were opened, it is 1,000, as in
        ImageNet.
        """
        return self._assumed_classes or len(self.classes())

    def classes(self) -> tuple[str, ...]:
        """Returns the names of the classes of the training images."""
        return self._training_images().classes

    def test_images(self) -> LabelledImages:
        """Opens the test images on the first call, and returns them.

        If the recipe sets `eval.root`, they are all images of `eval.root`. If it sets only
        `data.val_fraction`, they are the part of `data.root` that this fraction holds out. If it
        sets neither, they are the part of `data.root` that is named val, validation or test.
        """
        if self._test is None:
            root, classes = self.run.eval.root, self.classes()
            if root:
                self._test = open_labelled(root, classes, where="eval.root")
            else:
                data = self.run.data
                self._test = open_split(data.root, "val", classes, val_fraction=data.val_fraction)
        return self._test

    _test: LabelledImages | None = None
    _training: LabelledImages | None = None

    def _training_images(self) -> LabelledImages:
        """Opens the training images on the first call, and returns them."""
        if self._training is None:
            data = self.run.data
            images = open_split(data.root, "train", val_fraction=data.val_fraction)
            self._training = few_labels(
                images, fraction=data.fraction, per_class=data.per_class, seed=data.label_seed
            )
        return self._training

    def _measure(
        self,
        engine: Engine,
        images: LabelledImages,
        bad: BadImages,
        batch_size: int,
        between: Callable[[], None],
    ) -> tuple[dict[str, float], Predictions]:
        """Tests the model on all test images; all ranks must call it, and get the same result.

        Args:
            engine: The engine of the task.
            images: The test images.
            bad: Collects the images that cannot be read.
            batch_size: Number of images of a forward.
            between: Called before each batch on every rank; may raise to stop.

        Returns: the metrics by name (`scores.averaged`), and the predictions of all images.
        """
        rank, world = distributed.rank(), distributed.world_size()
        run, device = self.run, distributed.device()
        mine = central_batches(
            images,
            image_size=run.data.image_size,
            batch_size=batch_size,
            rank=rank,
            world_size=world,
            workers=run.data.workers,
            max_pixels=run.data.max_pixels,
        )
        side = run.data.image_size
        idle = CentralBatch(0, torch.zeros(1, 3, side, side).byte(), torch.full((1,), NO_LABEL), ())
        totals: dict[str, Tensor] = {}
        # Class and label plus one, so that 0 stays where no rank has an answer.
        answers = torch.zeros(2, len(images), dtype=torch.int64, device=device)
        num_bad = 0
        # Under ZeRO-3 every rank must run as many forwards as the rank with most batches.
        rounds = -(-len(images) // (batch_size * world))
        with in_float32(engine, self.make_task) as measured:
            for _ in activity.counted(range(rounds), "test images", "batches"):
                between()
                batch = next(mine, idle)
                bad.add(0, batch.bad)
                num_bad += len(batch.bad)
                labels = batch.labels.to(device)
                _, sums = measured(batch.images.to(device), labels)
                predicted = sums.pop("predicted")
                if batch is not idle:
                    here = slice(batch.start, batch.start + len(predicted))
                    answers[:, here] = 1 + torch.stack([predicted, labels])
                totals = {k: totals[k] + v if k in totals else v for k, v in sums.items()}
        # Sums in float64: counts are exact, and losses do not depend on the number of ranks.
        totals["bad"] = torch.tensor(num_bad, dtype=torch.float64, device=device)
        summed = distributed.sum_tensor(torch.stack(list(totals.values())))
        sums = dict(zip(totals, summed, strict=True))
        count = BadCount(int(sums.pop("bad")), len(images))
        if error := agreed_error(count, run.data.max_bad_fraction, bad.names):
            raise error
        return averaged(sums), Predictions(*(distributed.sum_tensor(answers) - 1).cpu().numpy())

    def stored_student(self) -> StoredStudent:
        """Describes the student in checkpoints, with the image statistics of this training.

        The final norm of a ViT is absent, since the classifier has a norm of the mean token
        instead.
        """
        architecture = trained_at(self.run)
        discarded = FINAL_NORM if architecture.mean_norm == "instead" else {}
        return StoredStudent(architecture, discarded, self.statistics())


class FineTuningJob(ClassificationJob):
    """The job of fine-tuning, in which the whole student learns labels."""

    ignored_fields = FINETUNE.ignored_fields

    def check(self) -> None:
        """Checks the recipe as the base class does, and also checks the classifier.

        A run of the classifier on the meta device shows whether it returns a logit for each class.
        """
        super().check()
        with torch.device("meta"):
            task = self.make_task()
        name, classes = self.run.task.finetune.head, len(self.classes())
        check_head(task.head, name, (2, task.student.width), classes, where=HEAD)

    def make_task(self) -> FineTuning:
        """Constructs the task: the student, without the final norm of a ViT, and the classifier."""
        return FineTuning(
            make_student(self.run.student, image_size=self.run.data.image_size),
            self.num_classes,
            statistics=self.statistics(),
            head=self.run.task.finetune.head,
        )

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """Yields this rank's micro-batches of augmented and mixed images, with their targets.

        The shapes are those of `MixedBatches`.

        Args:
            samples: The training images and their labels.
            portion: The epoch, the step to begin with, and this rank's share of each global batch.
        """
        run = self.run
        size = run.batch.global_batch_size
        batches = MixedBatches(
            cast(LabelledImages, samples),
            run.task.finetune,
            self.statistics(),
            self.view_settings(),
            run.runtime.seed,
            portion.epoch,
            size,
        )
        return iter(
            build_loader(
                batches,
                len(samples),
                portion,
                global_batch_size=size,
                workers=run.data.workers,
            )
        )

    def probe_batch(self, size: int) -> Batch:
        """Makes a batch of `size` images of zeros; targets have equal shares of all classes."""
        side, num_classes = self.run.data.image_size, self.num_classes
        positions = torch.arange(size)
        return Batch(
            torch.zeros(size, 3, side, side),
            0,
            positions,
            positions,
            targets=torch.full((size, num_classes), 1 / num_classes),
        )


class LinearProbeJob(ClassificationJob):
    """The job of the linear probe: a linear layer learns labels from a frozen model's features.

    The frozen model has the weights of `student.init`.
    """

    ignored_fields = LINEAR.ignored_fields

    _frozen: Frozen | None = None
    _hash = ""

    def check(self) -> None:
        """Checks the recipe, the images, the frozen model's weights, and the batch norm's groups.

        Raises:
            FDError: if the recipe, the images or the weights cannot be used, for example if the
                size of a group does not divide the global batch size.
        """
        size, group = self.run.batch.global_batch_size, self.run.task.linear.norm_batch
        if size % self._group:
            raise ConfigError(
                f"task.linear.norm_batch: does not divide batch.global_batch_size = {size}; got "
                f"{group}, expected a divisor. Change one of the two."
            )
        super().check()
        self._frozen_weights()  # Refuses wrong weights before the frozen model is built.

    @property
    def _group(self) -> int:
        """Number of images that share the statistics of the batch norm."""
        return min(self.run.task.linear.norm_batch, self.run.batch.global_batch_size)

    def view_settings(self) -> ViewSettings:
        """Returns the recipe's settings of views; a crop that exceeds the image is cut to it."""
        return replace(super().view_settings(), cuts_boxes=True)

    def build(self, *, bfloat16: bool, node_size: int, persistence_threshold: int) -> None:
        """Builds the frozen model with its weights, unsharded on every rank.

        Args:
            bfloat16: Whether training runs the frozen model in bfloat16; tests run in float32.
            node_size: Not used.
            persistence_threshold: Not used.
        """
        tested = partition.build(
            self._feature, {}, partitioned=False, seed=self.run.runtime.seed + 1
        )
        weights = self._frozen_weights()
        if weights is not None:
            partition.load_weights(tested.model, weights, where="--student.init")
        self._hash = fingerprint(tested.model)
        tested.to(distributed.device())
        learning = tested
        if bfloat16:
            learning = copy.deepcopy(tested)
            partition.to_bfloat16(learning)
        self._frozen = Frozen(learning, tested)

    def _frozen_weights(self) -> Iterable[tuple[str, Tensor]] | None:
        """Returns (name, tensor) for each tensor of the frozen model's weights.

        The result is None if `student.init` is empty. The frozen model then has random weights.
        """
        left_out = super().stored_student().absent
        student, size = self.run.student, self.run.data.image_size
        return student_weights(student, self.weights, image_size=size, without=left_out)

    def _feature(self) -> FrozenFeature:
        """Constructs the frozen model with random weights."""
        model = make_student(self.run.student, image_size=self.run.data.image_size)
        return FrozenFeature(model, self.statistics(), pool=self.run.task.linear.pool)

    def make_task(self) -> LinearProbing:
        """Constructs the task with the frozen model, which has random weights before `build`."""
        frozen = self._frozen
        if frozen is None:
            feature = self._feature()
            frozen = Frozen(feature, feature)
        return LinearProbing(frozen, self.num_classes, norm_batch=self._group)

    def models_on_shapes(self) -> tuple[LinearProbing, tuple[nn.Module, ...]]:
        """Constructs the task and a new frozen model on the meta device, to count operations.

        Returns: the task, and a tuple that holds the frozen model.
        """
        built, self._frozen = self._frozen, None
        task = cast(LinearProbing, super().models_on_shapes()[0])
        self._frozen = built
        return task, (task.models()["frozen."],)

    def initial_weights(self) -> InitialWeights:
        """Returns no weights, since the linear layer starts from random weights."""
        return {}

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """Yields this rank's micro-batches of random crops and flips, with their labels.

        A micro-batch holds whole groups of images (`GroupedBatches`).

        Args:
            samples: The training images and their labels.
            portion: The epoch, the step to begin with, and this rank's share of each global batch.
        """
        run = self.run
        views = LabelledViews(
            cast(LabelledImages, samples), self.view_settings(), run.runtime.seed, portion.epoch
        )
        return iter(
            build_loader(
                GroupedBatches(views, self._group),
                len(samples),
                portion,
                global_batch_size=run.batch.global_batch_size,
                workers=run.data.workers,
            )
        )

    def probe_batch(self, size: int) -> Batch:
        """Makes a micro-batch of `size` labelled grey images.

        If `size` is not a multiple of the batch norm's group size, images without labels are added.
        """
        return probe_batch(size, self.run.data.image_size, norm_batch=self._group)

    def norm_group(self) -> int:
        """Returns 0, since no batch norm of the student uses the statistics of a batch.

        The frozen model uses the statistics that were loaded with its weights.
        """
        return 0

    def images_together(self) -> int:
        """Returns the number of images that share the statistics of the batch norm.

        The number of images that are loaded for a micro-batch is a multiple of this number.
        """
        return self._group

    def hooks(self) -> Sequence[Hook]:
        """Returns the hook that warns if micro-batches are not whole groups of the batch norm."""
        return (_GroupWarning(self._group),)

    def facts(self) -> Mapping[str, Any]:
        """Returns the source and the hash of the frozen model's weights, for the manifest."""
        return {"frozen_source": self.run.student.init, "frozen_hash": self._hash}

    def check_stored(self, manifest: Mapping[str, Any]) -> None:
        """Checks that a checkpoint's linear layer was trained on this run's frozen model.

        Args:
            manifest: The checkpoint's manifest.

        Raises: CheckpointError: if the layer was trained on a model with another hash.
        """
        if manifest.get("frozen_hash") != self._hash:
            raise CheckpointError(
                "student.init: not the model that this probe began with; got hash "
                f"{self._hash}, expected {manifest.get('frozen_hash')} "
                f"({manifest.get('frozen_source')}). Set --student.init to that model, or start "
                "over with --fresh."
            )

    def stored_student(self) -> StoredStudent:
        """Raises CheckpointError in all cases, since checkpoints hold only the linear layer."""
        raise CheckpointError(
            f"{self.run.run_dir()}: a linear probe trains no model; got a run that stores only a "
            f"layer, expected the model itself. Name {self.run.student.init or 'its weights'}."
        )


class _GroupWarning(Hook):
    """Warns at the start of training if micro-batches are not whole groups of the batch norm.

    Args:
        group: Number of images of a group, which share the statistics of the batch norm.
    """

    def __init__(self, group: int) -> None:
        self._group = group

    def on_start(self, setting: Setting) -> None:
        """Logs a warning on rank 0 if micro-batches are not whole groups of the batch norm.

        They are not if the group size does not divide `setting.micro_batch_size`.
        """
        size = setting.micro_batch_size
        if size % self._group and distributed.is_main():
            log.warning(
                "batch.micro_batch_size: statistics of the batch norm need whole groups of %d "
                "images (task.linear.norm_batch); got %d, so that each micro batch loads and "
                "computes at least %d. Set a multiple of %d, or use fewer ranks.",
                self._group,
                size,
                -(-size // self._group) * self._group,
                self._group,
            )


def own_section(run: Run) -> Any:
    """Returns the section of `run` that only its task has, such as `run.task.finetune`."""
    return getattr(run.task, _section(run))


def with_statistics(run: Run, statistics: Sequence[float]) -> Run:
    """Returns a recipe with the given image statistics.

    Args:
        run: The recipe.
        statistics: Mean and deviation of red, green and blue, six numbers.
    """
    section = replace(own_section(run), statistics=tuple(map(float, statistics)))
    return replace(run, task=replace(run.task, **{_section(run): section}))


def _section(run: Run) -> str:
    """Returns the name of the section of `run` that only its task has, such as "finetune"."""
    # `task.name` of a task of the user's own is module:FILE.py:NAME, not its section's name.
    kind = run.task.kind()
    assert kind is not None
    return kind.name

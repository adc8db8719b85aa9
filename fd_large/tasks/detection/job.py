"""The detection job, which trains on images and objects in COCO's format and measures AP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from fd_large.backbones import batch_norm
from fd_large.backbones.statistics import IMAGENET
from fd_large.backbones.translation import Piece
from fd_large.checkpoint import store, stream
from fd_large.data.loader import Batch
from fd_large.data.sampler import Portion
from fd_large.data.source import ImageSource
from fd_large.engine.evaluation import Evaluation, Pending, evaluating
from fd_large.engine.job import StoredStudent, TrainingJob, trained_at
from fd_large.engine.student import make_student, student_weights
from fd_large.engine.zero.engine import Engine, InitialWeights
from fd_large.errors import ConfigError, DataError
from fd_large.ranks import distributed
from fd_large.recipes.file_names import EVALUATED, of_step
from fd_large.recipes.run import Run
from fd_large.tasks.dense.stages import LEFT_OUT
from fd_large.tasks.dense.stored import HeadTensors, head_shapes
from fd_large.tasks.detection.data.annotations import CocoSet, open_coco
from fd_large.tasks.detection.data.loader import build_training_loader
from fd_large.tasks.detection.data.target import Target, Targets
from fd_large.tasks.detection.data.views import Jitter, LargeScaleJitter, ShortestEdge
from fd_large.tasks.detection.heads.selection import Selection
from fd_large.tasks.detection.scores.evaluation import (
    evaluate,
    left_in,
    scoring_of,
)
from fd_large.tasks.detection.scores.scoring import read_ground_truth, score
from fd_large.tasks.detection.scores.views import Model, TestViews
from fd_large.tasks.detection.section import HEADS_SETTINGS, KIND, METRICS
from fd_large.tasks.detection.task import Ask, Detection
from fd_large.weights.coverage import Fitted

# Only a few of COCO's images have more objects.
OBJECTS_OF_PROBE = 64


class DetectionJob(TrainingJob):
    """Trains a student on the objects of `data.root`'s train split, and tests it on a val split."""

    metrics: ClassVar = METRICS
    ignored_fields = KIND.ignored_fields

    def open_samples(self) -> ImageSource:
        """Opens the training images and their objects.

        Raises:
            DataError or ConfigError: if the images cannot be used, do not have the number of
                classes in the recipe, or lack masks or semantic maps that the recipe needs.
        """
        data = self.run.data
        images = open_coco(data.root, "train").part("train", data.val_fraction)
        # First, so that the mistakes below are reported together with those that `check` finds.
        self._categories = dict(zip(images.category_ids, images.category_names, strict=True))
        self._has_masks = images.has_masks
        check_classes(self.run, images)
        if self.run.task.detection.copy_instances and not images.has_masks:
            raise ConfigError(
                f"task.detection.copy_instances: {images.annotations} has no masks for cutting "
                f"out objects; got {self.run.task.detection.copy_instances}, expected 0. Leave "
                "the field out."
            )
        if classes := self.run.task.detection.semantic_classes:
            images.check_semantic(classes, where="data.root")
        return cast(ImageSource, images)

    def check(self) -> None:
        """Opens the test images, checks that they can be scored, and checks the weights' headers.

        Raises: FDError: if the recipe, the images or the weights cannot be used.
        """
        super().check()
        if "_categories" not in vars(self):
            return  # The training images could not be opened, which is reported already.
        # A dataset may have no test split; eval.root then names another dataset.
        self._test_images = self.test_images(tuple(self._categories.values()), where="eval.root")
        if distributed.is_main():
            # Annotations that cannot be scored are refused before hours of training.
            score(read_ground_truth(self._test_images.annotations, self._test_images.only), [])

    def norm_group(self) -> int:
        """Returns 0, since no batch norm of the student uses the statistics of a batch.

        For a student with such batch norms, `make_task` raises ConfigError.
        """
        return 0

    def make_task(self) -> Detection:
        """Constructs the student, a pyramid, a proposal network and the heads.

        A ViT keeps the grid of its distillation (architecture.image_size), whatever the size of the
        images, since its position table and its windows are made for that grid.

        Raises:
            ConfigError: if the recipe sets `sequential_stages` for a student that lacks such
                stages, or if the student has batch norms that use the statistics of a batch.
        """
        student, numbers = self.run.student, self.run.task.detection
        if numbers.sequential_stages and not self.run.student_architecture().has_sequential_stages:
            raise ConfigError(
                f"task.detection.sequential_stages: {student.model} has no sequential stages; got "
                f"{numbers.sequential_stages}, expected 0. Leave the field out."
            )
        net = make_student(student, sequential_stages=numbers.sequential_stages)
        if self.run.norm_batch() and batch_norm.norms_of(net):
            raise ConfigError(
                "student.norm_batch: statistics of a batch would depend on how a micro batch is "
                f"padded; got {self.run.norm_batch()} for {student.model}, expected 0 with trained "
                "weights. Set --student.norm_batch 0 and --student.init."
            )
        return Detection(
            net,
            numbers.num_classes,
            heads=numbers.heads,
            heads_settings={
                argument: getattr(numbers, field)
                for field, argument in HEADS_SETTINGS.get(numbers.heads, {}).items()
            },
            width=numbers.head_width,
            anchors_per_image=numbers.anchors_per_image,
            proposals_per_image=numbers.proposals_per_image,
            rois_per_image=numbers.rois_per_image,
            extra_attention=numbers.extra_attention,
            selection=selection_of(self.run),
            seed=self.run.runtime.seed,
        )

    def initial_weights(self) -> InitialWeights:
        """Returns the weights that `student.init` provides for the student, pyramid and heads.

        Pyramid and heads are included only if `student.init` is a detection run. A layer starts
        from random weights if its shape in that run differs, for example by another number of
        classes. Mask heads start from random weights if that run's dataset had no masks.
        """
        student = student_weights(self.run.student, self.weights, without=LEFT_OUT)
        return {} if student is None else {"student": student, **self._initial_heads()}

    def _initial_heads(self) -> InitialWeights:
        source = self.run.student.init
        stored = self.weights.resolve(source, where="--student.init").stored if source else None
        manifest = stored and store.manifest_of(stored.path)
        if not manifest or manifest["recipe"]["task"]["name"] != KIND.name:
            return {}
        theirs = head_shapes(DetectionJob(Run.from_dict(manifest["recipe"])).make_task)
        shapes = head_shapes(self.make_task)
        file = HeadTensors(stream.newest(stored.path, where="--student.init"), theirs)
        fits = {name for name, shape in shapes.items() if theirs.get(name) == shape}
        if not manifest.get("masks", True):
            # A run on a dataset with only boxes has not trained its mask heads.
            fits = {n for n in fits if not any(part.startswith("mask") for part in n.split("."))}
        heads = {}
        for module in dict.fromkeys(name.partition(".")[0] for name in shapes):
            start = f"{module}."
            expected = {n.removeprefix(start): s for n, s in shapes.items() if n.startswith(start)}
            heads[module] = Fitted(
                {n: Piece((start + n,)) for n in expected if start + n in fits},
                file,
                expected,
                allow=tuple(n for n in expected if start + n not in fits),
                label=f"{source}, {module}",
                where="--student.init",
                resize=False,
            )
        return heads

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """Yields this rank's micro-batches: randomly resized images with their visible objects.

        Args:
            samples: The training images and their objects.
            portion: The epoch, the step to begin with, and this rank's share of each global batch.
        """
        run = self.run
        return iter(
            build_training_loader(
                cast(CocoSet, samples),
                jitter_of(run),
                portion,
                seed=run.runtime.seed,
                global_batch_size=run.batch.global_batch_size,
                workers=run.data.workers,
                max_pixels=run.data.max_pixels,
                semantic_classes=run.task.detection.semantic_classes,
                copy_probability=run.task.detection.copy_instances,
            )
        )

    def probe_batch(self, size: int) -> Batch:
        """Makes a batch of `size` grey images with `OBJECTS_OF_PROBE` objects each.

        The images have the largest size that the recipe's training views can have.
        """
        side, count = self.run.data.image_size, OBJECTS_OF_PROBE
        numbers = self.run.task.detection
        height, width = numbers.whole_size[1:] if any(numbers.whole_size) else (side, side)
        positions = torch.arange(size)
        corner = torch.arange(count).float()[:, None] / count * height / 2
        target = Target(
            torch.cat([corner, corner, corner + height / 4, corner + height / 4], dim=1),
            torch.zeros(count, dtype=torch.int64),
            torch.ones(count, height, width, dtype=torch.uint8),
            torch.zeros(0, 4),
            0,
        )
        return Batch(
            torch.full((size, 3, height, width), 128, dtype=torch.uint8),
            0,
            positions,
            positions,
            targets=Targets(
                [target] * size, torch.tensor([[height, width]] * size), np.arange(size), 0
            ),
        )

    def evaluations(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int
    ) -> Sequence[Evaluation]:
        """Returns a single evaluation, by COCO's metrics, which writes into RUN/evaluations.

        Before the first step, the evaluation does nothing, since new heads detect nothing.

        Args:
            engine: The task in its engine.
            samples: Not used.
            micro_batch_size: Largest number of images in a forward of a rank.
        """
        run, images = self.run, self._test_images
        task = cast(Detection, engine.task)

        def see(pixels: Tensor, sizes: Tensor, ask: Ask | None) -> Any:
            return engine.deepspeed(pixels=task.pixels(pixels, sizes), sizes=sizes, ask=ask)

        model = model_of(run, see)

        def measure(
            step: int, last: bool, between: Callable[[], None]
        ) -> tuple[dict[str, float] | Pending, None]:
            if step == 0:
                return {}, None
            with evaluating(engine):
                scoring = evaluate(
                    model,
                    images,
                    of_step(self.folder, step),
                    batch_size=micro_batch_size,
                    workers=run.data.workers,
                    max_pixels=run.data.max_pixels,
                    draw=last,
                    between=between,
                )
            return scoring, None

        def left(finished: int, again: bool) -> tuple[int, Pending] | None:
            unfinished = left_in(self.folder, finished - again)
            if unfinished is None:
                return None
            step, folder = unfinished
            return step, scoring_of(images, folder, draw=False, max_pixels=run.data.max_pixels)

        return [Evaluation(measure, run.eval.every, left)]

    def stored_student(self) -> StoredStudent:
        """Describes the student in checkpoints, without final norm and class tokens.

        A ViT is described with the grid of patches of its distillation.
        """
        architecture = self.run.student_architecture()
        if not architecture.resizes_positions:
            architecture = trained_at(self.run)
        return StoredStudent(architecture, LEFT_OUT, IMAGENET)

    def facts(self) -> Mapping[str, Any]:
        """Returns the entries "categories" and "masks" of the manifest.

        "categories" is {id in the annotations, as text: name}. "masks" is True if the training
        images have masks, so that the mask heads are trained.
        """
        return {
            "categories": {str(number): name for number, name in self._categories.items()},
            "masks": self._has_masks,
        }

    @property
    def folder(self) -> Path:
        """The folder RUN/evaluations, with a folder for each evaluation of the run."""
        return Path(self.run.run_dir()) / EVALUATED

    def test_images(self, classes: tuple[str, ...], *, where: str = "") -> CocoSet:
        """Opens the test images.

        If the recipe sets `eval.root`, the test images are the val split of `eval.root`. If it sets
        only `data.val_fraction`, they are the part of `data.root`'s train split that this fraction
        holds out. If it sets neither, they are the val split of `data.root`.

        Args:
            classes: Names of the classes that the detector learns or has learnt, by label.
            where: The recipe's field to name in messages; "" for the field that names the folder of
                the images.

        Raises:
            DataError or ConfigError: if the images cannot be used, or have other classes than
                `classes`.
        """
        data, root = self.run.data, self.run.eval.root
        where = where or ("eval.root" if root else "data.root")
        if data.val_fraction and not root:
            images = open_coco(data.root, "train").part("val", data.val_fraction)
        else:
            images = open_coco(root or data.root, "val", where=where)
        check_classes(self.run, images)
        names = images.category_names
        if names != classes:
            label = next(i for i, name in enumerate(classes) if names[i] != name)
            raise DataError(
                f"{where}: {images.annotations} has other classes than the training set; got "
                f"{names[label]!r} for label {label}, expected {classes[label]!r}. Give its "
                "categories the names and the order of the training set."
            )
        return images


def check_classes(run: Run, images: CocoSet) -> None:
    """Checks that a dataset has as many classes as the heads (`task.detection.num_classes`).

    Args:
        run: The recipe.
        images: A split of the dataset.

    Raises: ConfigError: if the numbers differ.
    """
    num_categories, expected = len(images.category_ids), run.task.detection.num_classes
    if num_categories != expected:
        raise ConfigError(
            f"task.detection.num_classes: not the number of classes in {images.annotations}; got "
            f"{expected}, expected {num_categories}. Set --task.detection.num_classes "
            f"{num_categories}."
        )


def jitter_of(run: Run) -> Jitter:
    """Returns the random resizing of training images that the recipe sets.

    If `task.detection.whole_size` is set, images stay whole (`ShortestEdge`). Otherwise they are
    cropped to a square (`LargeScaleJitter`).
    """
    numbers = run.task.detection
    if any(numbers.whole_size):
        return ShortestEdge(*numbers.whole_size)
    smallest, largest = numbers.scale_range
    return LargeScaleJitter(run.data.image_size, min_scale=smallest, max_scale=largest)


def selection_of(run: Run) -> Selection:
    """Returns the recipe's settings for the selection of the boxes that the detector reports."""
    section = run.task.detection
    return Selection(
        nms=section.nms,
        iou=section.nms_iou,
        least_score=section.least_score,
        at_most=section.detections_per_image,
        rescored=section.rescore_by_masks,
    )


def model_of(run: Run, see: Callable[[Tensor, Tensor, Ask | None], Any]) -> Model:
    """Returns the model under test, with the test settings of the recipe.

    Args:
        run: The recipe.
        see: Maps images, their sizes and an `Ask` to a result for each image (`Model.see`).
    """
    section, side = run.task.detection, run.data.image_size
    short, long = section.test_size if any(section.test_size) else (side, side)
    views = TestViews(
        short,
        long,
        section.test_scales,
        section.test_flip,
        section.test_merge,
        section.test_areas,
        # Whole training images were padded to the largest image of their batch.
        square=0 if any(section.whole_size) else side,
    )
    return Model(see, views, selection_of(run), section.proposals_per_image)

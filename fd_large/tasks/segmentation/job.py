"""The job of segmentation: images with a class for each pixel, the student's weights, mIoU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from fd_large import distributed, meeting
from fd_large.atomic_files import out_folder
from fd_large.backbones.statistics import IMAGENET
from fd_large.checkpoint.read import Reader
from fd_large.data.loader import Batch, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.source import ImageSource
from fd_large.engine.evaluation import Evaluation, evaluating
from fd_large.engine.job import Job, Predicted, StoredScores, StoredStudent, trained_at
from fd_large.engine.student import make_student, student_weights
from fd_large.engine.zero.engine import Engine
from fd_large.errors import ConfigError
from fd_large.recipes.fields import require
from fd_large.recipes.run import Run
from fd_large.runtime.hooks import Hook, Setting
from fd_large.tasks.classification.mean_token import DISCARDED
from fd_large.tasks.dense.evaluation import predict_some
from fd_large.tasks.dense.loader import TrainingBatches
from fd_large.tasks.dense.pixels import PADDING
from fd_large.tasks.dense.stages import is_of_one_size
from fd_large.tasks.dense.stored import task_to_test
from fd_large.tasks.dense.target import Targets
from fd_large.tasks.segmentation.data.classes import Classes, classes_of
from fd_large.tasks.segmentation.data.dataset import SegmentationSet, open_segmentation
from fd_large.tasks.segmentation.data.views import LONG_SIDE, TestViews, TrainingViews
from fd_large.tasks.segmentation.scores.evaluation import Model, evaluate, keep
from fd_large.tasks.segmentation.scores.tables import classes_table, numbers_table
from fd_large.tasks.segmentation.section import KIND, ON_LAST_MAP
from fd_large.tasks.segmentation.stored import predict_images
from fd_large.tasks.segmentation.task import Segmentation
from fd_large.weights.model_card import Learned
from fd_large.weights.origin import without_folders

log = logging.getLogger(__name__)


class SegmentationJob(Job):
    """The student learns the pixels of `data.root`'s train split, tested on its val split."""

    metrics: ClassVar = {
        "loss": "sum of both heads' losses",
        "val/mIoU": "mIoU (%)",
        "val/mAcc": "mAcc (%)",
        "val/aAcc": "aAcc (%)",
    }
    ignored_fields = KIND.ignored_fields

    def open_samples(self) -> ImageSource:
        """Opens the training images and their labels."""
        run = self.run
        images = self._open(run.data.root, "train", "data.root")
        self._classes = classes_of(
            run.data.root, run.task.segmentation.num_classes, run.task.segmentation.classes
        )
        return cast(ImageSource, images)

    def check(self) -> None:
        """Opens the test images, and checks the headers of the weights and the way of testing."""
        super().check()
        self._test_images = self.test_images()
        own = self.run.task.segmentation
        if own.frozen and self.run.student.drop_path_rate:
            raise ConfigError(
                "student.drop_path_rate: a frozen student is used as it is; got "
                f"{self.run.student.drop_path_rate}, expected 0 beside task.segmentation.frozen. "
                "Set --student.drop_path_rate 0."
            )
        with torch.device("meta"):
            one_size = is_of_one_size(self.make_task().student)
        if one_size and own.test_mode == "whole":
            raise ConfigError(
                f"task.segmentation.test_mode: {self.run.student.model} sees images of one size; "
                "got whole, expected slide. Set --task.segmentation.test_mode slide."
            )
        test_views(self.run)

    def make_task(self) -> Segmentation:
        """The student, its maps, and the heads."""
        run, own = self.run, self.run.task.segmentation
        return Segmentation(
            make_student(run.student, image_size=run.data.image_size),
            own.num_classes,
            head=own.head,
            width=own.head_width,
            auxiliary_weight=own.auxiliary_weight,
            over=own.loss_over,
            frozen=own.frozen,
            seed=run.runtime.seed,
        )

    def initial_weights(self) -> Iterable[tuple[str, Tensor]] | None:
        """Returns those of `student.init`, positions resized to the crop."""
        run = self.run
        return student_weights(
            run.student, self.weights, image_size=run.data.image_size, without=self._left_out()
        )

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """Yields random crops with the classes of their pixels."""
        run, own = self.run, self.run.task.segmentation
        views = TrainingViews(
            run.data.image_size, own.scale_range, own.cat_max_ratio, own.photometric
        )
        return iter(
            build_loader(
                TrainingBatches(
                    cast(SegmentationSet, samples), views, run.runtime.seed, portion.epoch
                ),
                len(samples),
                portion,
                global_batch_size=run.batch.global_batch_size,
                workers=run.data.workers,
            )
        )

    def probe_batch(self, size: int) -> Batch:
        """Makes grey images of one class."""
        side, positions = self.run.data.image_size, torch.arange(size)
        targets = Targets(
            torch.zeros(size, side, side, dtype=torch.int16),
            torch.tensor([[side, side]] * size),
            np.arange(size),
            0,
        )
        images = torch.full((size, 3, side, side), PADDING, dtype=torch.uint8)
        return Batch(images, 0, positions, positions, targets=targets)

    def evaluations(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int
    ) -> Sequence[Evaluation]:
        """Returns the scores on all test images; scores and pictures go into RUN/evaluations.

        Nothing is tested before the first step, as new heads know no class.
        """
        run, task = self.run, cast(Segmentation, engine.task)

        def logits(images: Tensor) -> Tensor:
            return engine.deepspeed(pixels=task.pixels(images))

        model = Model(logits, test_views(run), micro_batch_size)

        def measure(
            step: int, last: bool, between: Callable[[], None]
        ) -> tuple[dict[str, float], None]:
            if step == 0:
                return {}, None
            folder = Path(run.run_dir()) / "evaluations" / f"update_{step:08d}"
            with evaluating(engine):
                outcome = evaluate(
                    model, self._test_images, workers=run.data.workers, between=between
                )
                some = predict_some(outcome.errors, model, self._test_images) if last else None
            if distributed.is_main():
                try:
                    keep(outcome, some, self._test_images, self._classes, folder)
                except Exception:
                    # A full disk, a font: on rank 0 alone, and the scores stand without it.
                    log.exception("%s: NOT WRITTEN: scores or pictures of the test", folder)
            return {f"val_{name}": v for name, v in outcome.scores.numbers().items()}, None

        return [Evaluation(measure, run.eval.every)]

    def hooks(self) -> Sequence[Hook]:
        """Returns what warns of batch norms that see a part of a step."""
        return (_PassWarning(),)

    def stored_student(self) -> StoredStudent:
        """On the grid of the crop, without the final norm where the head has no use for it."""
        return StoredStudent(trained_at(self.run), self._left_out(), IMAGENET)

    def learned(self, manifest: Mapping[str, Any]) -> Learned:
        """Returns what the model card says of the classes."""
        name = without_folders(self.run.data.root)
        lacks = " It had no final norm, which only normalises here." if self._left_out() else ""
        return replace(
            super().learned(manifest),
            title=f"trained to segment {name}",
            intro="An image backbone that was trained to name the class of each pixel; the heads "
            f"are left out.{lacks}",
            tag="image-segmentation-backbone",
        )

    def facts(self) -> Mapping[str, Any]:
        """Returns names and colours of the classes."""
        classes = self._classes
        return {"classes": {"names": list(classes.names), "colors": [*map(list, classes.colors)]}}

    def score_stored(self, reader: Reader, folder: Path) -> StoredScores:
        """The scores on the val split of `eval.root` or `data.root`."""
        run, micro = self.run, self.run.batch.micro_batch_size
        views = test_views(run)
        images = meeting.meet(self.test_images)
        logits = distributed.together(
            lambda: task_to_test(self.make_task, reader, precision=run.engine.precision)
        ).logits
        model = Model(logits, views, 1 if micro == "auto" else micro)
        out_folder(folder)
        classes = stored_classes(reader)
        outcome = evaluate(model, images, workers=run.data.workers)
        some = predict_some(outcome.errors, model, images)
        if not distributed.is_main():
            return StoredScores((), ())
        drawn = keep(outcome, some, images, classes, folder)
        tables = (
            numbers_table(outcome.scores, len(images)),
            classes_table(outcome.scores, classes.names),
        )
        return StoredScores(tables, (folder / "scores.json", *drawn))

    def predict(
        self, reader: Reader, images: Sequence[str], folder: Path, *, least_score: float
    ) -> Iterator[Predicted]:
        """The class of each pixel, drawn over the image with a legend."""
        views = test_views(self.run)
        task = task_to_test(self.make_task, reader, precision=self.run.engine.precision)
        return predict_images(
            Model(task.logits, views),
            images,
            folder,
            stored_classes(reader),
            max_pixels=self.run.data.max_pixels,
        )

    def test_images(self) -> SegmentationSet:
        """Opens the val split of `eval.root`, or if that is not set of `data.root`.

        Raises: DataError: if the images cannot be used.
        """
        root = self.run.eval.root
        return self._open(root or self.run.data.root, "val", "eval.root" if root else "data.root")

    def _open(self, root: str, split: str, where: str) -> SegmentationSet:
        own = self.run.task.segmentation
        return open_segmentation(
            root,
            split,
            num_classes=own.num_classes,
            ignore_value=own.ignore_value,
            reduce_zero_label=own.reduce_zero_label,
            max_pixels=self.run.data.max_pixels,
            where=where,
        )

    def _left_out(self) -> Mapping[str, float]:
        return {} if self.run.task.segmentation.head in ON_LAST_MAP else DISCARDED


class _PassWarning(Hook):
    """Says at the start that a step has several passes, once their number is known."""

    def on_start(self, setting: Setting) -> None:
        if setting.accumulation > 1 and distributed.is_main():
            log.warning(
                "batch norms see the %d images of a pass, of the step's %d: another number of "
                "passes is another run",
                setting.micro_batch_size * setting.world_size,
                setting.global_batch_size,
            )


def stored_classes(reader: Reader) -> Classes:
    """Returns the classes of a stored run."""
    stored = reader.manifest["classes"]
    return Classes(tuple(stored["names"]), tuple((r, g, b) for r, g, b in stored["colors"]))


def test_views(run: Run) -> TestViews:
    """Returns how the recipe's test sees an image.

    Raises: ConfigError: if windows would leave pixels out between them.
    """
    own, side = run.task.segmentation, run.data.image_size
    short, long = own.test_size if any(own.test_size) else (side, LONG_SIDE * side)
    slides = own.test_mode == "slide"
    require(
        not slides or own.test_stride <= side,
        "task.segmentation.test_stride: windows leave gaps",
        own.test_stride,
        f"at most data.image_size = {side}, or 0",
    )
    return TestViews(
        short,
        long,
        own.test_scales,
        own.test_flip,
        crop=side if slides else 0,
        stride=(own.test_stride or 2 * side // 3) if slides else 0,
    )

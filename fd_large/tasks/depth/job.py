"""The depth job, which trains on images with a depth for each pixel and measures RMSE."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

from torch import Tensor

from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.engine.job import StoredStudent
from fd_large.tasks.dense.job import DenseJob
from fd_large.tasks.depth.data.dataset import DepthSet, open_depth
from fd_large.tasks.depth.data.views import TestViews, TrainingViews
from fd_large.tasks.depth.scores.evaluation import Model, Outcome, evaluate, keep
from fd_large.tasks.depth.scores.metrics import crop_of
from fd_large.tasks.depth.section import KIND, METRICS, ON_LAST_MAP
from fd_large.tasks.depth.task import Depth

# With these statistics, normalisation leaves pixels between 0 and 1.
AS_THEY_ARE = Statistics((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


class DepthJob(DenseJob):
    """Trains a student on the depths of `data.root`'s train split, and tests it on a val split."""

    metrics: ClassVar = METRICS
    lower_is_better = KIND.lower_is_better
    ignored_fields = KIND.ignored_fields
    on_last_map = ON_LAST_MAP

    def open_split(self, root: str, split: str, where: str) -> DepthSet:
        """Opens the images of a split with their depth files.

        Args:
            root: The dataset's folder.
            split: "train" or "val".
            where: The recipe's field that names the folder, for messages.

        Raises: DataError: if the images or depth files cannot be used.
        """
        section = self.section
        return open_depth(
            root,
            split,
            list_file=section.train_list if split == "train" else section.val_list,
            depth_scale=section.depth_scale,
            valid_range=section.valid_range,
            bottom_crop=section.bottom_crop,
            limits=(section.min_depth, section.max_depth),
            max_pixels=self.run.data.max_pixels,
            where=where,
        )

    def training_views(self) -> TrainingViews:
        """Returns the random crops of training images that the recipe sets."""
        section = self.section
        return TrainingViews(
            image_size=self.run.data.image_size,
            colors=section.colors,
            cut_depth=section.cut_depth,
            cut_depth_bytes=section.cut_depth_bytes,
            max_depth=section.max_depth,
            depth_scale=section.depth_scale,
        )

    def test_images(self) -> DepthSet:
        """Opens the test images, and checks for some of them that `task.depth.test_crop` fits.

        Raises:
            DataError or ConfigError: if the images cannot be used, or if `task.depth.test_crop` is
                defined for images of another size.
        """
        images, section = super().test_images(), self.section
        for truth in images.some_truths():
            sides = section.bottom_crop if any(section.bottom_crop) else truth.shape
            crop_of(section.test_crop, *sides)
        return cast(DepthSet, images)

    def make_task(self) -> Depth:
        """Constructs the student and its head."""
        section = self.section
        return Depth(
            self.student_module(),
            max_depth=section.max_depth,
            head=section.head,
            width=section.head_width,
            over=section.loss_over,
            mean_share=section.loss_lambda,
            factor=section.loss_factor,
            frozen=section.frozen,
            statistics=self._statistics(),
        )

    def model_to_test(self, forward: Callable[[Tensor], Tensor], at_once: int) -> Model:
        """Returns the model under test, with the test settings of the recipe.

        Args:
            forward: Maps images (B, 3, h, w) uint8 to depths (B, h, w) in metres.
            at_once: Largest number of windows in a forward.
        """
        section = self.section
        views = TestViews(self.run.data.image_size, section.test_windows, section.test_flip)
        return Model(forward, views, at_once)

    def whole_images(self) -> str:
        """Returns an error message if the recipe tests whole images; "" if it tests windows.

        The message is used if the student accepts images of a single size only.
        """
        if self.section.test_windows:
            return ""
        return (
            f"task.depth.test_windows: {self.run.student.model} accepts only one image size; got "
            "0, expected 2 or more. Set --task.depth.test_windows 2."
        )

    def measure(self, model: Model, images: DepthSet, between: Callable[[], None]) -> Outcome:
        """Tests a model on all images; all ranks must call this method.

        Args:
            model: The model under test.
            images: The test images and their depths.
            between: Called before each image on every rank; may raise to end the test.
        """
        section = self.section
        return evaluate(
            model,
            images,
            limits=(section.min_depth, section.max_depth),
            crop=section.test_crop,
            workers=self.run.data.workers,
            between=between,
        )

    def keep(self, outcome: Outcome, some: Any, images: DepthSet, folder: Path) -> list[Path]:
        """Writes the scores of a test, and draws images with depth and error.

        This method is called on rank 0 alone.

        Args:
            outcome: Result of the test.
            some: The images to draw, from `predict_some`; None draws nothing.
            images: The test images and their depths.
            folder: The folder to write to.

        Returns: the paths of the plots.
        """
        return keep(outcome, some, images, folder)

    def stored_student(self) -> StoredStudent:
        """Describes the student in checkpoints, with the image statistics of this training."""
        return super().stored_student()._replace(statistics=self._statistics())

    def _statistics(self) -> Statistics:
        return IMAGENET if self.section.normalise else AS_THEY_ARE

"""The segmentation job, which trains on images with a class for each pixel and measures mIoU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fd_large.data.source import ImageSource
from fd_large.engine.zero.engine import InitialWeights
from fd_large.recipes.fields import require
from fd_large.recipes.run import Run
from fd_large.tasks.dense.job import DenseJob
from fd_large.tasks.dense.stored import head_shapes
from fd_large.tasks.segmentation.data.classes import classes_of
from fd_large.tasks.segmentation.data.dataset import SegmentationSet, open_segmentation
from fd_large.tasks.segmentation.data.views import LONG_SIDE, TestViews, TrainingViews
from fd_large.tasks.segmentation.published import fitted_heads
from fd_large.tasks.segmentation.scores.evaluation import Model, Outcome, evaluate, keep
from fd_large.tasks.segmentation.section import KIND, METRICS, ON_LAST_MAP
from fd_large.tasks.segmentation.task import Segmentation

_HEAD_INIT = "task.segmentation.head_init"


class SegmentationJob(DenseJob):
    """Trains a student on the labels of `data.root`'s train split, and tests it on a val split."""

    metrics: ClassVar = METRICS
    ignored_fields = KIND.ignored_fields
    on_last_map = ON_LAST_MAP
    truth = torch.int16

    def open_split(self, root: str, split: str, where: str) -> SegmentationSet:
        """Opens the images of a split with their labels.

        Args:
            root: The dataset's folder.
            split: "train" or "val".
            where: The recipe's field that names the folder, for messages.

        Raises: DataError: if the images or labels cannot be used.
        """
        section = self.section
        return open_segmentation(
            root,
            split,
            num_classes=section.num_classes,
            ignore_value=section.ignore_value,
            reduce_zero_label=section.reduce_zero_label,
            max_pixels=self.run.data.max_pixels,
            where=where,
        )

    def open_samples(self) -> ImageSource:
        """Opens the training images with their labels, and sets the attribute `classes`.

        `classes` has the names and colours of the dataset's classes.
        """
        images, section = super().open_samples(), self.section
        self.classes = classes_of(self.run.data.root, section.num_classes, section.classes)
        return images

    def training_views(self) -> TrainingViews:
        """Returns the random crops of training images that the recipe sets."""
        section = self.section
        return TrainingViews(
            self.run.data.image_size,
            section.scale_range,
            section.cat_max_ratio,
            section.photometric,
        )

    def make_task(self) -> Segmentation:
        """Constructs the student, its neck, and the heads."""
        section = self.section
        return Segmentation(
            self.student_module(),
            section.num_classes,
            head=section.head,
            width=section.head_width,
            auxiliary_weight=section.auxiliary_weight,
            over=section.loss_over,
            frozen=section.frozen,
            seed=self.run.runtime.seed,
        )

    def sources(self) -> Mapping[str, str]:
        """Returns {field of the recipe: source of weights} for the student and the heads.

        The field of the heads, `task.segmentation.head_init`, is left out if it is empty.
        """
        head_source = {_HEAD_INIT: self.section.head_init} if self.section.head_init else {}
        return {**super().sources(), **head_source}

    def initial_weights(self) -> InitialWeights:
        """Returns the weights from which the student, the heads and the neck start.

        Heads and neck have the weights that `task.segmentation.head_init` names. If this field is
        empty, they start from random weights.

        Raises: WeightsError: if weights do not fit the student, the heads or the neck.
        """
        source, student = self.section.head_init, super().initial_weights()
        if not source:
            return student
        where = f"--{_HEAD_INIT}"
        file = self.weights.resolve(source, where=where).tensors
        heads = fitted_heads(file, head_shapes(self.make_task), label=source, where=where)
        return {**student, **heads}

    def model_to_test(self, forward: Callable[[Tensor], Tensor], at_once: int) -> Model:
        """Returns the model under test, with the test settings of the recipe.

        Args:
            forward: Maps images (B, 3, h, w) uint8 to logits (B, K, h, w).
            at_once: Largest number of windows in a forward.

        Raises: ConfigError: if the recipe's windows leave gaps between them.
        """
        return Model(forward, test_views(self.run), at_once)

    def whole_images(self) -> str:
        """Returns an error message if the recipe tests whole images; "" if it tests windows.

        The message is used if the student accepts images of a single size only.
        """
        if self.section.test_mode != "whole":
            return ""
        return (
            f"task.segmentation.test_mode: {self.run.student.model} accepts only one image size; "
            "got whole, expected slide. Set --task.segmentation.test_mode slide."
        )

    def measure(
        self, model: Model, images: SegmentationSet, between: Callable[[], None]
    ) -> Outcome:
        """Tests a model on all images; all ranks must call this method.

        Args:
            model: The model under test.
            images: The test images and their labels.
            between: Called before each image on every rank; may raise to end the test.
        """
        return evaluate(model, images, workers=self.run.data.workers, between=between)

    def keep(
        self, outcome: Outcome, some: Any, images: SegmentationSet, folder: Path
    ) -> list[Path]:
        """Writes the scores of a test, and draws images and the confusion matrix.

        This method is called on rank 0 alone.

        Args:
            outcome: Result of the test.
            some: The images to draw, from `predict_some`; None draws nothing.
            images: The test images and their labels.
            folder: The folder to write to.

        Returns: the paths of the plots.
        """
        return keep(outcome, some, images, self.classes, folder)

    def facts(self) -> Mapping[str, Any]:
        """Returns the manifest's entry "classes", with the names and colours of the classes."""
        classes = self.classes
        return {"classes": {"names": list(classes.names), "colors": [*map(list, classes.colors)]}}


def test_views(run: Run) -> TestViews:
    """Returns the sizes at which the recipe tests an image, whole or by windows.

    Raises:
        ConfigError: if windows leave gaps between them, since `task.segmentation.test_stride`
            exceeds their side, `data.image_size`.
    """
    section, side = run.task.segmentation, run.data.image_size
    short, long = section.test_size if any(section.test_size) else (side, LONG_SIDE * side)
    slides = section.test_mode == "slide"
    require(
        not slides or section.test_stride <= side,
        "task.segmentation.test_stride: windows leave gaps",
        section.test_stride,
        f"at most data.image_size = {side}, or 0",
    )
    return TestViews(
        short,
        long,
        section.test_scales,
        section.test_flip,
        crop=side if slides else 0,
        stride=(section.test_stride or 2 * side // 3) if slides else 0,
    )

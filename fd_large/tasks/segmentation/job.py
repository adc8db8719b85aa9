"""The job of segmentation: images with a class for each pixel, the student's weights, mIoU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from fd_large.backbones.exports import Export
from fd_large.checkpoint.read import Reader
from fd_large.checkpoint.stream import Shape
from fd_large.data.source import ImageSource
from fd_large.engine.job import Predicted, StoredScores
from fd_large.errors import ConfigError
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.fields import require
from fd_large.recipes.run import Run
from fd_large.tasks.dense.job import DenseJob
from fd_large.tasks.dense.stages import blocks_taken, has_stages, neck_of, scales_of
from fd_large.tasks.dense.stored import head_shapes
from fd_large.tasks.segmentation.data.classes import Classes, classes_of
from fd_large.tasks.segmentation.data.dataset import SegmentationSet, open_segmentation
from fd_large.tasks.segmentation.data.views import LONG_SIDE, TestViews, TrainingViews
from fd_large.tasks.segmentation.published import Heads, fitted_heads, whole_export
from fd_large.tasks.segmentation.scores.evaluation import Model, Outcome, evaluate, keep
from fd_large.tasks.segmentation.scores.tables import classes_table, numbers_table
from fd_large.tasks.segmentation.section import KIND, METRICS, ON_LAST_MAP
from fd_large.tasks.segmentation.stored import predict_images
from fd_large.tasks.segmentation.task import Segmentation
from fd_large.weights.libraries import LIBRARIES, To
from fd_large.weights.model_card import ExportedStudent, Learned, card
from fd_large.weights.origin import without_folders

_HEAD_INIT = "task.segmentation.head_init"


class SegmentationJob(DenseJob):
    """The student learns the pixels of `data.root`'s train split, tested on its val split."""

    metrics: ClassVar = METRICS
    ignored_fields = KIND.ignored_fields
    on_last_map = ON_LAST_MAP
    truth = torch.int16

    def open_split(self, root: str, split: str, where: str) -> SegmentationSet:
        """Opens the images of a split and their labels."""
        own = self.section
        return open_segmentation(
            root,
            split,
            num_classes=own.num_classes,
            ignore_value=own.ignore_value,
            reduce_zero_label=own.reduce_zero_label,
            max_pixels=self.run.data.max_pixels,
            where=where,
        )

    def open_samples(self) -> ImageSource:
        """Opens the training images and their labels, and learns the names of the classes."""
        images, own = super().open_samples(), self.section
        self._classes = classes_of(self.run.data.root, own.num_classes, own.classes)
        return images

    def training_views(self) -> TrainingViews:
        """Returns how the recipe sees a training image."""
        own = self.section
        return TrainingViews(
            self.run.data.image_size, own.scale_range, own.cat_max_ratio, own.photometric
        )

    def make_task(self) -> Segmentation:
        """The student, its maps, and the heads."""
        own = self.section
        return Segmentation(
            self.student_module(),
            own.num_classes,
            head=own.head,
            width=own.head_width,
            auxiliary_weight=own.auxiliary_weight,
            over=own.loss_over,
            frozen=own.frozen,
            seed=self.run.runtime.seed,
        )

    def sources(self) -> Mapping[str, str]:
        """Returns the sources of the student and of the heads."""
        own = {_HEAD_INIT: self.section.head_init} if self.section.head_init else {}
        return {**super().sources(), **own}

    def initial_heads(self) -> Mapping[str, Iterable[tuple[str, Tensor]]]:
        """Returns the heads and what makes their maps from `task.segmentation.head_init`."""
        source = self.section.head_init
        if not source:
            return {}
        file = self.weights.tensors(source, where=f"--{_HEAD_INIT}")
        return fitted_heads(file, head_shapes(self.make_task), what=source, where=f"--{_HEAD_INIT}")

    def exported_into(self, architecture: FamilyArchitecture, to: To) -> Export | None:
        """Returns what the student becomes, with its heads where the library's files have them."""
        if not LIBRARIES[to].heads:
            return super().exported_into(architecture, to)
        own = self.section
        if own.head != "uper":
            raise ConfigError(
                f"export: --to {to}: holds UPerNet; got task.segmentation.head {own.head}, "
                "expected uper. Use another --to, which takes the backbone alone."
            )
        backbone = self.student_into(architecture, to)
        assert backbone is not None
        with torch.device("meta"):
            task = self.make_task()
        staged = has_stages(task.student)
        count, views = own.num_classes, test_views(self.run)
        heads = Heads(
            widths=neck_of(task.student)[1],
            width=own.head_width,
            names=classes_of(self.run.data.root, count, own.classes).names,
            auxiliary_width=task.auxiliary.width if task.auxiliary else 0,
            auxiliary_weight=own.auxiliary_weight,
            scales=() if staged else scales_of(task.student.patch_size),
            blocks=() if staged else blocks_taken(task.student.depths[0]),
            window=views.crop,
            window_stride=views.stride,
        )
        return whole_export(backbone, to, heads)

    def exported_beside(
        self, reader: Reader, student: Mapping[str, Shape], to: To
    ) -> Mapping[str, Shape]:
        """Returns the heads, and what makes their maps, if the library's files hold them."""
        return head_shapes(self.make_task) if LIBRARIES[to].heads else {}

    def model_card(self, exported: ExportedStudent) -> str:
        """Returns the model card; the heads are part of some exports."""
        learned = self.learned(exported.manifest)
        if LIBRARIES[exported.to].heads:
            learned = replace(
                learned,
                intro="An image backbone with UPerNet, trained to name the class of each pixel.",
                tag="image-segmentation",
            )
        return card(self.run.to_dict(), exported, learned)

    def model_to_test(self, forward: Callable[[Tensor], Tensor], at_once: int) -> Model:
        """Returns what is tested: logits, and how an image is seen."""
        return Model(forward, test_views(self.run), at_once)

    def whole_images(self) -> str:
        """Returns what is wrong with testing whole images, and the remedy; empty: none are."""
        if self.section.test_mode != "whole":
            return ""
        return (
            f"task.segmentation.test_mode: {self.run.student.model} sees images of one size; "
            "got whole, expected slide. Set --task.segmentation.test_mode slide."
        )

    def measure(
        self, model: Model, images: SegmentationSet, between: Callable[[], None]
    ) -> Outcome:
        """Tests a model on all images; a collective."""
        return evaluate(model, images, workers=self.run.data.workers, between=between)

    def keep(
        self, outcome: Outcome, some: Any, images: SegmentationSet, folder: Path
    ) -> list[Path]:
        """Writes scores.json, and draws images and the confusion."""
        return keep(outcome, some, images, self._classes, folder)

    def tables(self, outcome: Outcome, images: SegmentationSet) -> Sequence[Any]:
        """Returns the tables of the means and of the classes."""
        return [
            numbers_table(outcome.scores, len(images)),
            classes_table(outcome.scores, self._classes.names),
        ]

    def learned(self, manifest: Mapping[str, Any]) -> Learned:
        """Returns what the model card says of the classes."""
        name = without_folders(self.run.data.root)
        return replace(
            super().learned(manifest),
            title=f"trained to segment {name}",
            intro="An image backbone that was trained to name the class of each pixel; the heads "
            f"are left out.{self.lacks()}",
            tag="image-segmentation-backbone",
        )

    def facts(self) -> Mapping[str, Any]:
        """Returns names and colours of the classes."""
        classes = self._classes
        return {"classes": {"names": list(classes.names), "colors": [*map(list, classes.colors)]}}

    def score_stored(self, reader: Reader, folder: Path) -> StoredScores:
        """The scores on the val split of `eval.root` or `data.root`."""
        self._classes = stored_classes(reader)
        return super().score_stored(reader, folder)

    def predict(
        self, reader: Reader, images: Sequence[str], folder: Path, *, least_score: float
    ) -> Iterator[Predicted]:
        """The class of each pixel, drawn over the image with a legend."""
        views = test_views(self.run)
        return predict_images(
            Model(self.stored_task(reader).predict, views),
            images,
            folder,
            stored_classes(reader),
            max_pixels=self.run.data.max_pixels,
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

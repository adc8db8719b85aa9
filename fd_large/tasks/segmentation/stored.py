"""Exports or scores the model of a stored segmentation run, or applies it to users' images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fd_large.backbones.exports import Export
from fd_large.checkpoint.read import Reader
from fd_large.checkpoint.stream import Shape
from fd_large.errors import ConfigError
from fd_large.files import unlinked
from fd_large.recipes.family import FamilyArchitecture
from fd_large.tasks.dense.stages import blocks_taken, has_stages, neck_of, scales_of
from fd_large.tasks.dense.stored import Seen, StoredDense, head_shapes, predict_files
from fd_large.tasks.segmentation.data.classes import Classes, classes_of
from fd_large.tasks.segmentation.data.dataset import SegmentationSet
from fd_large.tasks.segmentation.job import SegmentationJob, test_views
from fd_large.tasks.segmentation.published import Heads, whole_export
from fd_large.tasks.segmentation.scores.evaluation import Model, Outcome
from fd_large.tasks.segmentation.scores.pictures import draw_prediction
from fd_large.tasks.segmentation.scores.tables import classes_table, numbers_table
from fd_large.tasks.stored_run import Predicted, StoredScores
from fd_large.weights.export import export_of
from fd_large.weights.libraries import LIBRARIES, To
from fd_large.weights.model_card import Learned
from fd_large.weights.origin import without_folders

# Number of classes that are named in the line of text about an image.
NAMED = 3


class StoredSegmentation(StoredDense):
    """A stored segmentation run, which commands can export, score, and use on images."""

    job: SegmentationJob

    def exported_into(self, architecture: FamilyArchitecture, to: To) -> Export | None:
        """Describes an export: of the student, or of the student with its heads.

        Args:
            architecture: The student's architecture, with the image size of the export.
            to: The library or format of the export. "mmseg" and "upernet" hold the heads too.

        Returns: how tensors and configuration are translated for the library. None if the format is
            a graph, which can hold any model.
        Raises: ConfigError: if the library lacks this model or these heads.
        """
        if not LIBRARIES[to].heads:
            return super().exported_into(architecture, to)
        section, student = self.job.section, self.run.student
        if section.head != "uper":
            raise ConfigError(
                f"export: --to {to}: this format holds UPerNet; got task.segmentation.head "
                f"{section.head}, expected uper. Use another --to, which exports the backbone "
                "alone."
            )
        pads = student.size_rule == "pad"
        backbone = export_of(architecture, to, pads=pads, window_rule=student.window_rule)
        assert backbone is not None
        with torch.device("meta"):
            task = self.job.make_task()
        staged = has_stages(task.student)
        count, views = section.num_classes, test_views(self.run)
        heads = Heads(
            widths=neck_of(task.student)[1],
            width=section.head_width,
            names=classes_of(self.run.data.root, count, section.classes).names,
            auxiliary_width=task.auxiliary.width if task.auxiliary else 0,
            auxiliary_weight=section.auxiliary_weight,
            scales=() if staged else scales_of(task.student.patch_size),
            blocks=() if staged else blocks_taken(task.student.depths[0]),
            window=views.crop,
            window_stride=views.stride,
        )
        return whole_export(backbone, to, heads)

    def exported_beside(
        self, reader: Reader, student: Mapping[str, Shape], to: To
    ) -> Mapping[str, Shape]:
        """Returns the shapes of the tensors of heads and neck, if they are exported too.

        Args:
            reader: The checkpoint that is exported; not used.
            student: {name: shape} of the student's tensors; not used.
            to: The library or format of the export.

        Returns: {name in the checkpoint: shape}; {} if the format does not hold the heads.
        """
        return head_shapes(self.job.make_task) if LIBRARIES[to].heads else {}

    def learned(self, manifest: Mapping[str, Any], to: To) -> Learned:
        """Returns the model card's title, introduction and tag for a segmentation model.

        Args:
            manifest: The manifest of the exported checkpoint.
            to: The library or format of the export, a value of the flag `--to`. It decides whether
                the card describes a backbone alone or a backbone with its heads.
        """
        name = without_folders(self.run.data.root)
        intro = (
            "An image backbone that was trained to name the class of each pixel; the heads are "
            f"left out.{self.without_norm()}"
        )
        if whole := LIBRARIES[to].heads:
            intro = "An image backbone with UPerNet, trained to name the class of each pixel."
        return replace(
            super().learned(manifest, to),
            title=f"trained to segment {name}",
            intro=intro,
            tag="image-segmentation" if whole else "image-segmentation-backbone",
        )

    def score(self, reader: Reader, folder: Path) -> StoredScores:
        """Scores the model on the test images; all ranks must call this method.

        The names of the classes in the tables and plots are those of the checkpoint.

        Args:
            reader: A checkpoint of the run.
            folder: Folder of scores and plots.

        Returns: tables and files on rank 0, and nothing on other ranks.
        """
        self.job.classes = _classes(reader)
        return super().score(reader, folder)

    def tables(self, outcome: Outcome, images: SegmentationSet) -> Sequence[Any]:
        """Returns two tables: one of mIoU, mAcc and aAcc, and one of the scores of each class.

        Args:
            outcome: The result of `SegmentationJob.measure`.
            images: The test images.
        """
        return [
            numbers_table(outcome.scores, len(images)),
            classes_table(outcome.scores, self.job.classes.names),
        ]

    def predict(
        self, reader: Reader, images: Sequence[str], folder: Path, *, least_score: float
    ) -> Iterator[Predicted]:
        """Draws the predicted classes over each image, and writes them to a label file (PNG).

        Args:
            reader: A checkpoint of the run.
            images: Paths of image files.
            folder: Folder of the results.
            least_score: Not used, since these predictions have no scores.
        """
        model, classes = Model(self.task(reader).predict, test_views(self.run)), _classes(reader)

        def see(image: Tensor, stem: str) -> Seen:
            size = (image.shape[-2], image.shape[-1])
            views = [view.image(image) for view in model.views.views(*size)]
            predicted = model.predict(views, size).cpu().numpy()
            drawn, labels = folder / f"{stem}.png", folder / f"{stem}_labels.png"
            shares = draw_prediction(image.permute(1, 2, 0).numpy(), predicted, classes, drawn)
            pixel = np.uint8 if len(classes.names) <= 256 else np.uint16
            Image.fromarray(predicted.astype(pixel)).save(unlinked(labels))
            text = ", ".join(f"{name} {100 * share:.0f}%" for name, share in shares[:NAMED])
            return {"labels": labels.name, "classes": dict(shares)}, text, drawn

        return predict_files(see, images, folder, max_pixels=self.run.data.max_pixels)


def _classes(reader: Reader) -> Classes:
    stored = reader.manifest["classes"]
    return Classes(tuple(stored["names"]), tuple((r, g, b) for r, g, b in stored["colors"]))

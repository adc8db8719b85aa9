"""The job of fine-tuning: labelled images, the student's weights, accuracy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch

from fd_large.data.labelled import LabelledImages
from fd_large.data.loader import Batch, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.source import ImageSource
from fd_large.engine.heads import check_head
from fd_large.engine.student import make_student
from fd_large.tasks.classification.job import ClassificationJob
from fd_large.tasks.finetuning.section import KIND
from fd_large.tasks.finetuning.task import HEAD, FineTuning
from fd_large.tasks.finetuning.views import TrainingBatches


class FineTuningJob(ClassificationJob):
    """The whole student learns the labels."""

    ignored_fields = KIND.ignored_fields

    def check(self) -> None:
        """Tries the classifier besides."""
        super().check()
        with torch.device("meta"):
            task = self.make_task()
        name, classes = self.run.task.finetune.head, len(self.classes())
        check_head(task.head, name, (2, task.student.width), classes, where=HEAD)

    def make_task(self) -> FineTuning:
        """Constructs the student, without a ViT's final norm, and a classifier."""
        return FineTuning(
            make_student(self.run.student, image_size=self.run.data.image_size),
            self.num_classes,
            statistics=self.statistics(),
            head=self.run.task.finetune.head,
        )

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """Yields augmented and mixed images."""
        run = self.run
        size = run.batch.global_batch_size
        batches = TrainingBatches(
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
        """Makes grey images with uniform targets."""
        side, num_classes = self.run.data.image_size, self.num_classes
        positions = torch.arange(size)
        return Batch(
            torch.zeros(size, 3, side, side),
            0,
            positions,
            positions,
            targets=torch.full((size, num_classes), 1 / num_classes),
        )

"""What the jobs share that train a classifier: labelled images of both splits, and the test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fd_large.backbones.registry import statistics_of
from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.data.bad_images import BadCount, BadImages, agreed_error
from fd_large.data.centre_crops import NO_LABEL, CentralBatch, central_batches
from fd_large.data.labelled import LabelledImages, open_labelled, open_split
from fd_large.data.source import ImageSource
from fd_large.data.views import ViewSettings
from fd_large.engine.evaluation import Evaluation, in_float32
from fd_large.engine.job import StoredStudent, TrainingJob, trained_at
from fd_large.engine.predictions import Predictions
from fd_large.engine.task import Task
from fd_large.engine.zero.engine import Engine
from fd_large.ranks import activity, distributed
from fd_large.recipes.run import Run
from fd_large.tasks.classification.mean_token import DISCARDED
from fd_large.tasks.classification.scores import averaged
from fd_large.tasks.classification.section import METRICS
from fd_large.weights.resolve import Sources

IMAGENET_CLASSES = 1000


class ClassificationJob(TrainingJob):
    """A classifier learns the labels of `data.root`/train and is tested on val or test.

    Its task gives logits of images, and in evaluation what `scores.summed` makes of them. Its
    section of the recipe has the field `statistics`.
    """

    metrics: ClassVar = METRICS

    def open_samples(self) -> ImageSource:
        """Opens the training images."""
        return self._training_images()

    def settle(self, sources: Sources) -> Run:
        """Returns the recipe completed from the student's weights, their statistics included."""
        run, init = super().settle(sources), self.run.student.init
        if own_section(self.run).statistics or not init:
            return run
        student = run.student_architecture()
        found = sources.resolve(init, where="--student.init").statistics_for(student)
        found = found or statistics_of(run.student.model, student)
        return with_statistics(run, (*found.mean, *found.std))

    def check(self) -> None:
        """Opens the test images, and checks the headers of the weights."""
        super().check()
        self.test_images()

    def view_settings(self) -> ViewSettings:
        """Returns how the recipe makes an image a view: bicubic, unlike in distillation."""
        data = self.run.data
        return ViewSettings(
            data.image_size, data.min_crop_scale, data.max_pixels, interpolation="bicubic"
        )

    def models_on_shapes(self) -> tuple[Task, tuple[nn.Module, ...]]:
        """Constructs the task; before the samples are open, with as many classes as ImageNet's."""
        if self._training is None:
            self._assumed_classes = IMAGENET_CLASSES
        return super().models_on_shapes()

    def evaluations(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int
    ) -> Sequence[Evaluation]:
        """Returns the accuracy on all test images, exact on any number of ranks.

        Images that cannot be read are named in the log and not counted; more of them than
        `data.max_bad_fraction` end the run.
        """
        images, bad = self.test_images(), BadImages()

        def measure(
            step: int, last: bool, between: Callable[[], None]
        ) -> tuple[dict[str, float], None]:
            found, predictions = self._measure(engine, images, bad, micro_batch_size, between)
            if last and distributed.is_main():
                predictions.write(Path(self.run.run_dir()))
            return {f"test_{name}": value for name, value in found.items()}, None

        return [Evaluation(measure, self.run.eval.every)]

    def statistics(self) -> Statistics:
        """Returns the statistics by which images are normalised; ImageNet's for random weights."""
        stated = own_section(self.run).statistics
        return Statistics(tuple(stated[:3]), tuple(stated[3:])) if stated else IMAGENET

    _assumed_classes = 0

    @property
    def num_classes(self) -> int:
        """Number of classes of the training images."""
        return self._assumed_classes or len(self.classes())

    def classes(self) -> tuple[str, ...]:
        """Returns the names of the classes of the training images."""
        return self._training_images().classes

    def test_images(self) -> LabelledImages:
        """Returns the test images of `eval.root`, or if that is not set of `data.root`."""
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
        if self._training is None:
            data = self.run.data
            self._training = open_split(data.root, "train", val_fraction=data.val_fraction)
        return self._training

    def _measure(
        self,
        engine: Engine,
        images: LabelledImages,
        bad: BadImages,
        batch_size: int,
        between: Callable[[], None],
    ) -> tuple[dict[str, float], Predictions]:
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
        # One more than the class, and than the label: what no rank fills stays 0.
        answers = torch.zeros(2, len(images), dtype=torch.int64, device=device)
        num_bad = 0
        # Under ZeRO-3 every rank must run as many forwards as the one with most batches.
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
        """Describes the student with the statistics of this training.

        The classifier normalises the mean of a ViT's tokens rather than the tokens, so that
        checkpoints lack the ViT's final norm.
        """
        architecture = trained_at(self.run)
        discarded = DISCARDED if architecture.mean_norm == "instead" else {}
        return StoredStudent(architecture, discarded, self.statistics())


def own_section(run: Run) -> Any:
    """Returns the task's section of a recipe."""
    return getattr(run.task, _section(run))


def with_statistics(run: Run, statistics: Sequence[float]) -> Run:
    """Returns a recipe that normalises images by these statistics."""
    section = replace(own_section(run), statistics=tuple(map(float, statistics)))
    return replace(run, task=replace(run.task, **{_section(run): section}))


def _section(run: Run) -> str:
    # A task of the user's own is named by the door that leads to it.
    kind = run.task.kind()
    assert kind is not None
    return kind.name

"""Fine-tuning as a job of the engine: labelled images, the student's weights, accuracy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import fields
from typing import Any, cast

import torch
from torch import Tensor

from fd_large import distributed
from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.data.bad_images import BadCount, BadImages, limit_error, past_limit
from fd_large.data.centre_crops import NO_LABEL, CentralBatch, central_batches
from fd_large.data.labelled import LabelledImages, open_labelled, open_split
from fd_large.data.loader import Batch, load_batches, micro_batches
from fd_large.data.source import ImageSource
from fd_large.engine.ema import Ema
from fd_large.engine.evaluation import evaluating
from fd_large.engine.job import Evaluate, Job, Portion
from fd_large.engine.student import build_student
from fd_large.engine.zero.engine import Engine
from fd_large.plan.parameters import shapes
from fd_large.recipes.sections import Objective
from fd_large.tasks.finetuning.task import DISCARDED, FineTuning, counted
from fd_large.tasks.finetuning.views import TrainingBatches
from fd_large.weights.source import open_weights

log = logging.getLogger(__name__)

# Fields of a recipe that mean nothing here: colours are RandAugment's, and tests see all images.
IDLE = (
    "data.color_jitter",
    "data.grayscale_probability",
    "eval.views",
    "eval.knn_root",
    "eval.knn_every",
    *(f"objective.{field.name}" for field in fields(Objective)),
)


class FineTuningJob(Job):
    """The student learns the labels of `data.root`/train and is tested on val or test."""

    def open_samples(self) -> ImageSource:
        """Opens the training images."""
        return self._training_images()

    def check(self) -> None:
        """Opens the images for tests, and the headers of the weights."""
        self.refuse(IDLE)
        self.test_images()
        self.initial_weights()

    def make_task(self) -> FineTuning:
        """The student, without the final norm of a ViT, and a classifier."""
        return FineTuning(
            build_student(self.run), len(self.classes()), statistics=self.statistics()
        )

    def initial_weights(self) -> Iterable[tuple[str, Tensor]] | None:
        """The student's from `student.init`, shared position biases copied to every block."""
        run = self.run
        if not run.student.init:
            return None
        architecture = run.student_architecture()
        is_vit = architecture.family == "vit"
        expected = shapes(architecture, image_size=run.data.image_size if is_vit else 0)
        discarded = DISCARDED if is_vit else ()
        return open_weights(run.student.init, where="--student.init").fitted(
            architecture,
            {name: shape for name, shape in expected.items() if name not in discarded},
            allow=(*run.student.init_allow, *discarded),
            where="--student.init",
            remedy="Name the model of the file by --student.model and --student.architecture.*, or "
            "set --student.init_allow NAMES to do without.",
        )

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """Augmented and mixed images."""
        run = self.run
        positions = micro_batches(
            len(samples),
            first_update=portion.first_update,
            global_batch_size=run.batch.global_batch_size,
            micro_batch_size=portion.micro_batch_size,
            rank=portion.rank,
            world_size=portion.world_size,
        )
        batches = TrainingBatches(
            cast(LabelledImages, samples),
            run.task.finetune,
            self.statistics(),
            run.runtime.seed,
            portion.epoch,
            run.batch.global_batch_size,
            run.data.image_size,
            run.data.min_crop_scale,
            run.data.max_pixels,
        )
        return iter(load_batches(batches, positions, workers=run.data.workers))

    def probe_batch(self, size: int) -> Batch:
        """Grey images that belong to every class alike."""
        side, num_classes = self.run.data.image_size, len(self.classes())
        positions = torch.arange(size)
        return Batch(
            torch.zeros(size, 3, side, side),
            0,
            positions,
            positions,
            targets=torch.full((size, num_classes), 1 / num_classes),
        )

    def evaluation(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int, ema: Ema | None
    ) -> Evaluate | None:
        """Accuracy on all images for tests, exact on any number of ranks.

        With the average of the weights where there is one. What cannot be read is named and not
        counted; past `data.max_bad_fraction` that ends the run.
        """
        pictures, bad = self.test_images(), BadImages()

        def evaluate(
            update: int, last: bool, between: Callable[[], None]
        ) -> tuple[dict[str, float], dict[str, Any] | None]:
            with ema.in_place_of_weights() if ema else nullcontext():
                found = self._measure(engine, pictures, bad, micro_batch_size, between)
            return {f"test_{name}": value for name, value in found.items()}, None

        return evaluate

    def statistics(self) -> Statistics:
        """By which images are normalised; ImageNet's for random weights."""
        stated = self.run.task.finetune.statistics
        return Statistics(tuple(stated[:3]), tuple(stated[3:])) if stated else IMAGENET

    def classes(self) -> tuple[str, ...]:
        """Names of the classes, those of the training images."""
        return self._training_images().classes

    def test_images(self) -> LabelledImages:
        """The images of `eval.root`, or those beside the training images."""
        root = self.run.eval.root
        if not root:
            return open_split(self.run.data.root, "val", self.classes())
        return open_labelled(root, self.classes(), where="eval.root")

    _pictures: LabelledImages | None = None

    def _training_images(self) -> LabelledImages:
        if self._pictures is None:
            self._pictures = open_split(self.run.data.root, "train")
        return self._pictures

    def _measure(
        self,
        engine: Engine,
        pictures: LabelledImages,
        bad: BadImages,
        batch_size: int,
        between: Callable[[], None],
    ) -> dict[str, float]:
        rank, world = distributed.rank(), distributed.world_size()
        run, device = self.run, distributed.device()
        mine = central_batches(
            pictures,
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
        num_bad = 0
        # Under ZeRO-3 every rank runs as many forwards as the one with most batches.
        for _ in range(-(-len(pictures) // (batch_size * world))):
            between()
            batch = next(mine, idle)
            bad.add(0, batch.bad)
            num_bad += len(batch.bad)
            prepared = engine.task.prepare(batch.images.to(device), batch.labels.to(device), None)
            with evaluating(engine):
                _, sums = engine.deepspeed(**prepared)
            totals = {k: totals[k] + v if k in totals else v for k, v in sums.items()}
        # Sums of float64: whole numbers, and losses that no order of ranks can tell apart.
        totals["bad"] = torch.tensor(num_bad, dtype=torch.float64, device=device)
        summed = distributed.sum_tensor(torch.stack(list(totals.values())))
        sums = dict(zip(totals, summed, strict=True))
        count = BadCount(int(sums.pop("bad")), len(pictures))
        if past_limit(count, run.data.max_bad_fraction):
            names = [name for mine in distributed.gather_objects(bad.names) for name in mine]
            error = limit_error(count, run.data.max_bad_fraction, names)
            error.agreed = True
            raise error
        return counted(sums)

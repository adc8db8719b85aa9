"""Distillation as a job: one set of images, a teacher beside the engine, held-out losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch

from fd_large import distributed
from fd_large.data.loader import Batch, build_loader
from fd_large.data.source import ImageSource, open_images
from fd_large.data.staging import stage
from fd_large.engine.ema import Ema
from fd_large.engine.job import Evaluate, Job, Portion
from fd_large.engine.student import Precision, student_weights
from fd_large.engine.task import Task
from fd_large.engine.zero.engine import Engine
from fd_large.tasks.distillation.build import (
    build_teacher,
    parameter_sizes,
    task_maker,
    teacher_weights,
)
from fd_large.tasks.distillation.held_out import Evaluation
from fd_large.tasks.distillation.placement import PlacedTeacher


class DistillationJob(Job):
    """The student learns the teacher's feature map."""

    _teacher: PlacedTeacher | None = None

    @property
    def teacher(self) -> PlacedTeacher:
        """The frozen model; there is none before `build`."""
        assert self._teacher is not None
        return self._teacher

    def open_samples(self) -> ImageSource:
        """Opens `data.root`."""
        return open_images(self.run.data.root)

    def check(self) -> None:
        """Opens the held-out images, and the headers of the weights."""
        if self.run.eval.root:
            self._held_out()
        teacher_weights(self.run)
        student_weights(self.run)

    def stage(self, samples: ImageSource) -> ImageSource:
        """Copies the images to `data.stage_to`."""
        return stage(samples, self.run.data.stage_to)

    def parameter_sizes(self) -> tuple[int, ...]:
        """Of student, projection and teacher."""
        return parameter_sizes(self.run)

    def build(self, precision: Precision, *, node_size: int, persistence_threshold: int) -> None:
        """Places the teacher."""
        self._teacher = build_teacher(
            self.run,
            precision,
            node_size=node_size,
            persistence_threshold=persistence_threshold,
        )

    def make_task(self) -> Task:
        """Student, projection and loss, around the teacher."""
        return task_maker(self.run, self.teacher, self.teacher.width)()

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """One crop of each image."""
        run = self.run
        return iter(
            build_loader(
                samples,
                seed=run.runtime.seed,
                global_batch_size=run.batch.global_batch_size,
                image_size=run.data.image_size,
                min_crop_scale=run.data.min_crop_scale,
                workers=run.data.workers,
                color_jitter=run.data.color_jitter,
                grayscale_probability=run.data.grayscale_probability,
                max_pixels=run.data.max_pixels,
                **portion._asdict(),
            )
        )

    def probe_batch(self, size: int) -> Batch:
        """Grey images."""
        side = self.run.data.image_size
        images = torch.full((size, 3, side, side), 128, dtype=torch.uint8)
        positions = torch.arange(size)
        return Batch(images, 0, positions, positions)

    def evaluation(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int, ema: Ema | None
    ) -> Evaluate | None:
        """Held-out images, and crops of the training images that training never sees.

        With the average of the weights where there is one.
        """
        run = self.run
        if not run.eval.root:
            return None
        pictures = {"held_out": self._held_out(), "unseen_crops": samples}
        sets = distributed.together(
            lambda: [
                Evaluation(
                    name,
                    of,
                    views=run.eval.views,
                    image_size=run.data.image_size,
                    min_crop_scale=run.data.min_crop_scale,
                    micro_batch_size=micro_batch_size,
                    seed=run.runtime.seed,
                    max_pixels=run.data.max_pixels,
                    skip_bad=name == "unseen_crops",
                )
                for name, of in pictures.items()
            ]
        )

        def evaluate(
            update: int, last: bool, between: Callable[[], None]
        ) -> tuple[dict[str, float], dict[str, Any] | None]:
            metrics: dict[str, float] = {}
            with ema.in_place_of_weights() if ema else nullcontext():
                for views in sets:
                    metrics |= views.measure(engine, between)
                    if last:
                        constant = views.best_constant(engine, between)
                        metrics[f"{views.name}_best_constant"] = constant
                panel = sets[0].panel(engine) if update == 0 or last else None
            return metrics, panel

        return evaluate

    def facts(self) -> Mapping[str, Any]:
        """Which teacher."""
        return {
            "teacher_source": self.run.teacher.source,
            "teacher_hash": self.teacher.fingerprint,
        }

    def checks(self) -> Mapping[str, Callable[[], Any]]:
        """The teacher's own shard, and its map of fixed images."""
        size = self.run.data.image_size
        return {
            "teacher_shard": self.teacher.shard_hash,
            "teacher_map": lambda: self.teacher.map_of_fixed_images(size),
        }

    def _held_out(self) -> ImageSource:
        return open_images(self.run.eval.root, where="eval.root")

"""The job that segmentation and depth share: trains and tests on a target for each pixel."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor

from fd_large.backbones.statistics import IMAGENET
from fd_large.data.loader import Batch, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.source import ImageSource
from fd_large.engine.evaluation import Evaluation, evaluating
from fd_large.engine.job import StoredStudent, TrainingJob, trained_at
from fd_large.engine.student import FINAL_NORM, make_student
from fd_large.engine.zero.engine import Engine
from fd_large.errors import ConfigError
from fd_large.ranks import distributed
from fd_large.recipes.file_names import EVALUATED, of_step
from fd_large.runtime.hooks import Hook, Setting
from fd_large.tasks.dense.evaluation import predict_some
from fd_large.tasks.dense.loader import TrainingBatches
from fd_large.tasks.dense.pixels import PADDING
from fd_large.tasks.dense.stages import is_of_one_size
from fd_large.tasks.dense.target import Targets
from fd_large.tasks.dense.task import DenseTask

log = logging.getLogger(__name__)


class DenseJob(TrainingJob):
    """Job that trains a student on a target for each pixel, and tests it on a val split.

    A subclass opens the images, makes the task, and defines the training views and the tests.

    Attributes:
        section: The task's own section of the recipe, `task.NAME`.
    """

    on_last_map: ClassVar[Collection[str]] = ()
    """Names of the heads that read the student's last map after its final norm."""
    truth: ClassVar[torch.dtype] = torch.float32
    """Data type of the target of a pixel."""

    def __init__(self, run: Any) -> None:
        super().__init__(run)
        self.section = getattr(run.task, run.task.name)

    def open_split(self, root: str, split: str, where: str) -> Any:
        """Opens the images of a split and their targets.

        Args:
            root: The dataset's folder.
            split: "train" or "val".
            where: The recipe's field that names the folder, for messages.

        Raises: DataError: if the images or targets cannot be used.
        """
        raise NotImplementedError

    def training_views(self) -> Any:
        """Returns the `TrainingViews` of the recipe, which make views of training images."""
        raise NotImplementedError

    def model_to_test(self, forward: Callable[[Tensor], Tensor], at_once: int) -> Any:
        """Returns the model under test (`evaluation.Model`), with the recipe's test settings.

        Args:
            forward: Maps images (B, 3, H, W) uint8 to the task's predictions of their pixels.
            at_once: Largest number of windows in a forward.

        Raises: ConfigError: if the recipe's test settings do not fit the student.
        """
        raise NotImplementedError

    def whole_images(self) -> str:
        """Returns an error message if the recipe tests whole images of any size; otherwise "".

        This method is called only if the student accepts images of a single size.
        """
        raise NotImplementedError

    def measure(self, model: Any, images: Any, between: Callable[[], None]) -> Any:
        """Tests a model on all images; all ranks must call this method.

        Args:
            model: The result of `model_to_test`.
            images: The test images.
            between: Called before each image on every rank; may raise to end the test.

        Returns: an object with two attributes. `scores` has a method `numbers()`, which returns
            {name: score}. `errors`, (N,) float64, has the error of each image.
        """
        raise NotImplementedError

    def keep(self, outcome: Any, some: Any, images: Any, folder: Path) -> list[Path]:
        """Writes the scores of a test, and draws some images; called on rank 0 alone.

        Args:
            outcome: The result of `measure`.
            some: The result of `predict_some`; None to draw nothing.
            images: The test images.
            folder: Folder of the files.

        Returns: the paths of the drawn files.
        """
        raise NotImplementedError

    def open_samples(self) -> ImageSource:
        """Opens the training images and their targets."""
        data = self.run.data
        images = self.open_split(data.root, "train", "data.root")
        return cast(ImageSource, images.part("train", data.val_fraction))

    def test_images(self) -> Any:
        """Opens the test images and their targets.

        If the recipe sets `eval.root`, the test images are the val split of `eval.root`. If it sets
        only `data.val_fraction`, they are the part of `data.root`'s train split that this fraction
        holds out. If it sets neither, they are the val split of `data.root`.

        Raises: DataError: if the images cannot be used.
        """
        data, root = self.run.data, self.run.eval.root
        if data.val_fraction and not root:
            images = self.open_split(data.root, "train", "data.root")
            return images.part("val", data.val_fraction)
        return self.open_split(root or data.root, "val", "eval.root" if root else "data.root")

    def norm_group(self) -> int:
        """Returns the number of images that share statistics of the student's batch norms.

        The result is 0 if the batch norms use the running statistics that were loaded with the
        student's weights, as those of a frozen student always do.
        """
        return 0 if self.section.frozen else super().norm_group()

    def check(self) -> None:
        """Opens the test images, and checks weights, crop size, test settings and drop path.

        Raises: FDError: if the images, the weights or the recipe cannot be used.
        """
        super().check()
        self._test_images = self.test_images()
        student, name = self.run.student, self.run.task.name
        if self.section.frozen and student.drop_path_rate:
            raise ConfigError(
                "student.drop_path_rate: a frozen student has no drop path; got "
                f"{student.drop_path_rate}, expected 0 beside task.{name}.frozen. "
                "Set --student.drop_path_rate 0."
            )
        with torch.device("meta"):
            module = self.make_task().student
        if is_of_one_size(module):
            size, patch = self.run.data.image_size, module.patch_size
            if size % patch:
                raise ConfigError(
                    f"data.image_size: {student.model} would see a stretched part of the crop; got"
                    f" {size} pixels, expected a multiple of its patch of {patch}. Set "
                    f"--data.image_size {next_multiple(size, patch)}."
                )
            if problem := self.whole_images():
                raise ConfigError(problem)
        self.model_to_test(lambda images: images, 1)

    def student_module(self) -> torch.nn.Module:
        """Constructs the student for images of the crop's size."""
        return make_student(self.run.student, image_size=self.run.data.image_size)

    def batches(self, samples: ImageSource, portion: Portion) -> Iterator[Batch]:
        """Yields this rank's micro-batches of random crops, with a class or depth for each pixel.

        Args:
            samples: The training images and their targets.
            portion: The epoch, the step to begin with, and this rank's share of each global batch.
        """
        run = self.run
        return iter(
            build_loader(
                TrainingBatches(
                    cast(Any, samples), self.training_views(), run.runtime.seed, portion.epoch
                ),
                len(samples),
                portion,
                global_batch_size=run.batch.global_batch_size,
                workers=run.data.workers,
            )
        )

    def probe_batch(self, size: int) -> Batch:
        """Makes a batch of `size` grey images, in which every pixel has the target 1."""
        side, positions = self.run.data.image_size, torch.arange(size)
        targets = Targets(
            torch.ones(size, side, side, dtype=self.truth),
            torch.tensor([[side, side]] * size),
            np.arange(size),
            0,
        )
        images = torch.full((size, 3, side, side), PADDING, dtype=torch.uint8)
        return Batch(images, 0, positions, positions, targets=targets)

    def evaluations(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int
    ) -> Sequence[Evaluation]:
        """Returns a single evaluation, on all test images, which writes files to RUN/evaluations.

        Before the first step, the evaluation tests nothing, since the head's weights are random.

        Args:
            engine: The task in its engine.
            samples: Not used.
            micro_batch_size: Largest number of windows in a forward of a rank.
        """
        run, task, images = self.run, cast(DenseTask, engine.task), self._test_images

        def forward(pixels: Tensor) -> Tensor:
            return engine.deepspeed(pixels=task.pixels(pixels))

        model = self.model_to_test(forward, micro_batch_size)

        def measure(
            step: int, last: bool, between: Callable[[], None]
        ) -> tuple[dict[str, float], None]:
            if step == 0:
                return {}, None
            folder = of_step(Path(run.run_dir()) / EVALUATED, step)
            with evaluating(engine):
                outcome = self.measure(model, images, between)
                some = predict_some(outcome.errors, model, images) if last else None
            if distributed.is_main():
                try:
                    self.keep(outcome, some, images, folder)
                except Exception:
                    # A full disk or a missing font: only rank 0 fails, and the scores are known.
                    log.exception("%s: NOT WRITTEN: scores or pictures of the test", folder)
            return {f"val_{name}": v for name, v in outcome.scores.numbers().items()}, None

        return [Evaluation(measure, run.eval.every)]

    def hooks(self) -> Sequence[Hook]:
        """Returns the hook that warns if batch norms see only a part of a step's images."""
        return (_PassWarning(),)

    def stored_student(self) -> StoredStudent:
        """Describes the student in checkpoints, for images of the crop's size.

        The student has no final norm, unless the head reads the map after it (`on_last_map`).
        """
        absent = {} if self.section.head in self.on_last_map else FINAL_NORM
        return StoredStudent(trained_at(self.run), absent, IMAGENET)


def next_multiple(size: int, of: int) -> int:
    """Returns the smallest multiple of `of` that is not less than `size`."""
    return -(-size // of) * of


class _PassWarning(Hook):
    """Warns at the start of training if each rank has several micro-batches in a step.

    The head's batch norms then see only a part of the step's images at once.
    """

    def on_start(self, setting: Setting) -> None:
        """Logs a warning on rank 0 if a rank has several micro-batches in a step.

        Their number is `setting.accumulation`.
        """
        if setting.accumulation > 1 and distributed.is_main():
            log.warning(
                "batch norms see %d of the %d images of a step at a time: another number of micro "
                "batches changes the result",
                setting.micro_batch_size * setting.world_size,
                setting.global_batch_size,
            )

"""From a recipe to its detector, and to the weights of its student."""

from __future__ import annotations

from collections.abc import Callable

from fd_large.engine.student import make_student
from fd_large.errors import ConfigError
from fd_large.recipes.run import Run
from fd_large.tasks.detection.task import Detection

# Of a distilled model, what a detector has no use for.
LEFT_OUT = ("norm.weight", "norm.bias", "cls_token", "dist_token")


def detector_maker(run: Run) -> Callable[[], Detection]:
    """A constructor of the recipe's detector, with random weights from torch's generator.

    A ViT keeps the grid of its distillation (architecture.image_size), whatever the size of the
    images: its positions and its windows are made for that.

    Raises: ConfigError: for settings that do not fit the student; constructing raises more.
    """
    numbers = run.task.detection
    if numbers.sequential_stages and not run.student_architecture().has_sequential_stages:
        raise ConfigError(
            f"task.detection.sequential_stages: {run.student.model} has no such stages; got "
            f"{numbers.sequential_stages}, expected 0. Leave it out."
        )

    def make() -> Detection:
        student = make_student(run.student, sequential_stages=numbers.sequential_stages)
        return Detection(
            student,
            numbers.num_classes,
            width=numbers.head_width,
            anchors_per_image=numbers.anchors_per_image,
            proposals_per_image=numbers.proposals_per_image,
            rois_per_image=numbers.rois_per_image,
            detections_per_image=numbers.detections_per_image,
            seed=run.runtime.seed,
        )

    return make

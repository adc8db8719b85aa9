"""From a recipe to its detector, and to the weights of its student."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from fd_large.backbones.registry import build
from fd_large.engine.student import attention_memory
from fd_large.errors import ConfigError
from fd_large.plan.parameters import shapes
from fd_large.recipes.run import Run
from fd_large.tasks.detection.task import Detection
from fd_large.weights.source import open_weights

# Of a distilled model, what a detector has no use for.
LEFT_OUT = ("norm.weight", "norm.bias", "cls_token", "dist_token")


def detector_maker(run: Run) -> Callable[[], Detection]:
    """A constructor of the recipe's detector, with random weights from torch's generator.

    A ViT keeps the grid of its distillation (architecture.image_size), whatever the size of the
    images: its positions and its windows are made for that.

    Raises: ConfigError: for settings that do not fit the student; constructing raises more.
    """
    numbers, family = run.task.detection, run.student_architecture().family
    if numbers.sequential_stages and family != "swinv2":
        raise ConfigError(
            f"task.detection.sequential_stages: {run.student.model} has no such stages; got "
            f"{numbers.sequential_stages}, expected 0. Leave it out."
        )

    def make() -> Detection:
        student = build(
            run.student.model,
            run.student.architecture,
            initialization=run.student.initialization,
            drop_path_rate=run.student.drop_path_rate,
            size_rule=run.student.size_rule,
            residual_dtype=run.student.residual_dtype,
            attention_memory=attention_memory(run.student.attention_memory),
            sequential_stages=numbers.sequential_stages,
        )
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


def student_weights(run: Run) -> Iterable[tuple[str, Tensor]] | None:
    """(name, tensor) of a settled run's student from `student.init`; None for random weights.

    Raises: WeightsError: if the file does not fit the student.
    """
    if not run.student.init:
        return None
    architecture = run.student_architecture()
    kept = {name: s for name, s in shapes(architecture).items() if name not in LEFT_OUT}
    return open_weights(run.student.init, where="--student.init").fitted(
        architecture,
        kept,
        allow=(*run.student.init_allow, *LEFT_OUT),
        where="--student.init",
        remedy="Name the model of the file by --student.model and --student.architecture.*, or set "
        "--student.init_allow NAMES to do without.",
    )

"""The recipe's section `task.segmentation`, and the description of the task; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from fd_large.recipes.fields import at_least, check_types, not_negative, require, within
from fd_large.recipes.task_kind import TaskKind
from fd_large.tasks.dense.section import (
    IGNORED_FIELDS,
    check_head,
    check_scale_range,
    check_test_scales,
    check_test_size,
)

# Labels are int16.
MOST_CLASSES = 2**15
ON_LAST_MAP = {"linear"}
"""Names of heads that take only the student's last map, after the student's final norm."""


@dataclass(frozen=True, kw_only=True)
class Segmentation:
    """Settings of segmentation: the head on the student, its training and its test."""

    # Number of classes. ADE20K has 150.
    num_classes: int = 150
    # JSON file with the names of the classes in order: a list of names, or of objects with `name`
    # and `color` (red, green and blue in 0..255). Empty takes the names of ADE20K and Cityscapes,
    # else numbers.
    classes: str = ""
    # Number, in the label files, of pixels that are neither learnt nor scored.
    ignore_value: int = 255
    # Whether 0 in the label files is ignored too and class k has the number k + 1, as in ADE20K.
    reduce_zero_label: bool = False
    # Head that predicts classes from the student's maps. uper: UPerNet. linear: one layer on the
    # last map. Your own, made from (channels of the maps, head_width, number of classes):
    # module:FILE.py:NAME.
    head: str = "uper"
    # Weights that the heads start from: the file or folder of a whole segmentation model, in the
    # names of mmsegmentation or transformers, often the same as student.init. Empty: random.
    head_init: str = ""
    # Number of channels of UPerNet.
    head_width: int = 512
    # Weight of the loss of a second, small head on the third map. 0 turns it off.
    auxiliary_weight: float = 0.4
    # What the loss is divided by. all: the number of all pixels, ignored ones included, as in the
    # published runs. labelled: the number of labelled pixels of a pass on all ranks.
    loss_over: Literal["all", "labelled"] = "all"
    # Train the head alone; the student stays as it is. Set student.drop_path_rate to 0 with it.
    frozen: bool = False
    # Smallest and largest scale of a training image before it is cropped; at 1 its shorter side is
    # data.image_size, or its longer one four times that if it is very long.
    scale_range: tuple[float, float] = (0.5, 2.0)
    # Crops in which one class has more than this fraction of the labelled pixels are drawn again,
    # up to ten times, in (0, 1]. 1 takes every first crop.
    cat_max_ratio: float = 0.75
    # Whether brightness, contrast, saturation and hue of training images are changed at random.
    photometric: bool = True
    # How an image is tested. whole: in one forward. slide: by overlapping windows of
    # data.image_size, whose logits are averaged; needed for a student of one image size, such as a
    # ViT.
    test_mode: Literal["whole", "slide"] = "whole"
    # Distance from window to window, in pixels, at most data.image_size. 0: two thirds of that.
    test_stride: int = 0
    # Length of the shorter side of tested images, and the largest length of the longer side, in
    # pixels; windows limit no side. 0 0: data.image_size, and four times that.
    test_size: tuple[int, int] = (0, 0)
    # Scales of that size at which an image is seen; the probabilities are averaged.
    test_scales: tuple[float, ...] = (1.0,)
    # Whether it is also seen mirrored at each scale.
    test_flip: bool = False

    def __post_init__(self) -> None:
        check_types(self, "task.segmentation")
        require(
            2 <= self.num_classes <= MOST_CLASSES,
            "task.segmentation.num_classes: invalid number of classes",
            self.num_classes,
            f"2 to {MOST_CLASSES}",
        )
        at_least("task.segmentation.head_width", self.head_width, 1, "channels")
        at_least(
            "task.segmentation.ignore_value", self.ignore_value, 0, "(a number in the label files)"
        )
        at_least("task.segmentation.test_stride", self.test_stride, 0, "pixels")
        not_negative("task.segmentation.auxiliary_weight", self.auxiliary_weight)
        check_scale_range("task.segmentation", self.scale_range)
        within("task.segmentation.cat_max_ratio", self.cat_max_ratio, "(0, 1]")
        check_test_size("task.segmentation", self.test_size)
        check_test_scales("task.segmentation", self.test_scales)
        require(
            self.head not in ON_LAST_MAP or not self.auxiliary_weight,
            f"task.segmentation.auxiliary_weight: {self.head} has one map and no second head",
            self.auxiliary_weight,
            f"0 beside task.segmentation.head {self.head}",
            beside=("task.segmentation.head",),
        )


HOW_TO_TEST = tuple(
    f"task.segmentation.test_{name}" for name in ("mode", "stride", "size", "scales", "flip")
)
METRICS = {
    "loss": "sum of both heads' losses",
    "val/mIoU": "mIoU (%)",
    "val/mAcc": "mAcc (%)",
    "val/aAcc": "aAcc (%)",
}
"""The label of each metric in logs and reports, as in `TrainingJob.metrics`."""

KIND = TaskKind(
    name="segmentation",
    folder="segmentation",
    job="segmentation.job.SegmentationJob",
    stored="segmentation.stored.StoredSegmentation",
    transfer="dense.transfer.DenseTransfer",
    title="Segmentation",
    section=Segmentation,
    may_change=("task.segmentation.classes", *HOW_TO_TEST),
    scores_runs=True,
    depends_on_passes=True,
    ignored_fields=IGNORED_FIELDS,
    check_names=partial(check_head, task="segmentation"),
    metrics=lambda _: METRICS,
    scoring_fields=(*HOW_TO_TEST, "student.architecture.window_size", "student.stage_windows"),
    next_steps=(
        (
            "a score for each class, and pictures",
            ("evaluate", "{run}", "--out", "{run}/evaluation"),
        ),
        (
            "predictions for an image of your own",
            ("predict", "{run}", "IMAGE.jpg", "--out", "{run}/predictions"),
        ),
    ),
)

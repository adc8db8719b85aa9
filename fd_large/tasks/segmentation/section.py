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
    # JSON file with the names of the classes in the order of their numbers: a list of names, or of
    # objects with `name` and `color` (red, green and blue in 0..255). Empty: the names of ADE20K or
    # Cityscapes if the dataset is one of them, else numbers.
    classes: str = ""
    # Value in the label files that marks ignored pixels, which count neither in the loss nor in the
    # scores.
    ignore_value: int = 255
    # Whether pixels with the value 0 in the label files are ignored too. Class k, counted from 0,
    # then has the value k + 1, as in ADE20K.
    reduce_zero_label: bool = False
    # Head that predicts classes from the student's maps. uper: UPerNet. linear: one layer on the
    # last map. A head of your own, made from (channels of the maps, head_width, number of classes):
    # module:FILE.py:NAME.
    head: str = "uper"
    # Initial weights of the heads: the file or folder of a whole segmentation model, with the
    # tensor names of mmsegmentation or transformers; often the same as student.init. Empty: random
    # weights.
    head_init: str = ""
    # Number of channels of UPerNet.
    head_width: int = 512
    # Weight of the loss of an auxiliary head on the student's third map. 0 turns this head off.
    auxiliary_weight: float = 0.4
    # Divisor of the summed loss. all: the number of all pixels, ignored pixels included, as in the
    # published runs. labelled: the number of labelled pixels of a micro-batch on all ranks.
    loss_over: Literal["all", "labelled"] = "all"
    # Whether the head alone is trained, and the student keeps its weights. This needs
    # student.drop_path_rate 0.
    frozen: bool = False
    # Smallest and largest scale to which a training image is resized before it is cropped. At
    # scale 1 the shorter side has data.image_size pixels, or fewer if the longer side would exceed
    # four times data.image_size.
    scale_range: tuple[float, float] = (0.5, 2.0)
    # Fraction of a crop's labelled pixels, in (0, 1]. If one class has at least this fraction, or
    # if no pixel is labelled, another crop is drawn, up to 11 in all. 1 accepts the first crop.
    cat_max_ratio: float = 0.75
    # Whether brightness, contrast, saturation and hue of training images are changed at random.
    photometric: bool = True
    # How an image is tested. whole: in one forward. slide: in overlapping square windows of
    # data.image_size pixels a side, whose logits are averaged; a student of one image size, such as
    # a ViT, needs this.
    test_mode: Literal["whole", "slide"] = "whole"
    # Distance between neighbouring windows of test_mode slide, in pixels, at most
    # data.image_size. 0: two thirds of data.image_size.
    test_stride: int = 0
    # Length of the shorter side of a tested image, and largest length of its longer side, in
    # pixels. Windows do not limit the size. 0 0: data.image_size, and four times data.image_size.
    test_size: tuple[int, int] = (0, 0)
    # Scales at which an image is tested, as multiples of test_size. The probabilities of several
    # scales are averaged.
    test_scales: tuple[float, ...] = (1.0,)
    # Whether an image is also tested mirrored, at each scale.
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

"""The recipe's section `task.depth`, and the description of the task; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from fd_large.recipes.fields import at_least, check_types, not_negative, positive, require, within
from fd_large.recipes.task_kind import TaskKind
from fd_large.tasks.dense.section import IGNORED_FIELDS, check_head

ON_LAST_MAP = {"linear"}
"""Heads before which the student keeps its final norm; other heads come after a new norm."""


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Settings of depth estimation: the head on the student, its training and its test."""

    # Text file with a line for each training image: its path and that of its depth file, below
    # data.root. Empty: the images and depth files of the folder itself (docs/depth.md).
    train_list: str = ""
    # The same for the images of the test.
    val_list: str = ""
    # Number of the depth files' units in a metre: 1000 where they hold millimetres, 256 in KITTI.
    depth_scale: float = 1000.0
    # Depths of the files that are farther than the second number or no farther than the first, in
    # metres, are unknown, as 0 is. 0 0: none are.
    valid_range: tuple[float, float] = (0.0, 0.0)
    # Height and width of the part of an image, at the bottom and in the middle, that is used: 352
    # 1216 for KITTI. 0 0: all of it.
    bottom_crop: tuple[int, int] = (0, 0)
    # Largest depth that the head can give, in metres; the test leaves out pixels beyond it.
    max_depth: float = 10.0
    # Smallest depth, in metres; the test leaves out pixels that are nearer.
    min_depth: float = 0.001
    # Whether pixels are normalised by ImageNet's statistics, as students are distilled. Without it
    # they are between 0 and 1, as in the published runs.
    normalise: bool = True
    # Head that predicts depth from the student's last map. mim: the three transposed convolutions
    # of MIM-Depth. linear: one layer. Your own, made from (channels of the map, head_width, pixels
    # per place of the map): module:FILE.py:NAME.
    head: str = "mim"
    # Number of channels after the transposed convolutions.
    head_width: int = 128
    # Scale-invariant loss of Eigen: loss_factor x sqrt(mean d^2 - loss_lambda x (mean d)^2), d
    # being the difference of the logarithms. batch: one root over all pixels with a depth, of all
    # images of a step, as published. image: the mean of the roots of the images.
    loss_over: Literal["batch", "image"] = "batch"
    # Share of the squared mean that is taken away, in [0, 1]: 0.5 as published, 0.85 in BTS and
    # AdaBins, by which a wrong scale costs less.
    loss_lambda: float = 0.5
    # Factor of the loss: 1 as published, 10 in BTS and AdaBins.
    loss_factor: float = 1.0
    # Train the head alone; the student stays as it is. Set student.drop_path_rate to 0 with it.
    frozen: bool = False
    # Whether brightness, contrast, gamma, hue and saturation of training images are changed at
    # random.
    colors: bool = True
    # Share of the training images in which a strip from top to bottom shows the depth in place of
    # the image (CutDepth), in [0, 1]. 0 turns it off.
    cut_depth: float = 0.25
    # What such a strip shows. scaled: the depth, from 0 to 255 at max_depth. wrapped: the
    # numbers of the depth file modulo 256, as the published code does.
    cut_depth_bytes: Literal["scaled", "wrapped"] = "scaled"
    # Number of square windows of data.image_size, spread over the longer side, in which an image is
    # tested, 2 or more; more where they would leave gaps. 0: whole, which a student of one image
    # size, such as a ViT, cannot see.
    test_windows: int = 0
    # Whether each window or image is also seen mirrored, and the depths averaged.
    test_flip: bool = True
    # Part of an image that is scored. nyu: without the borders of NYUv2's images. kitti_garg,
    # kitti_eigen: the two parts in KITTI's published scores. none: the whole image.
    test_crop: Literal["none", "nyu", "kitti_garg", "kitti_eigen"] = "none"

    def __post_init__(self) -> None:
        check_types(self, "task.depth")
        for name in ("depth_scale", "max_depth", "loss_factor"):
            positive(f"task.depth.{name}", getattr(self, name))
        not_negative("task.depth.min_depth", self.min_depth)
        require(
            self.min_depth < self.max_depth,
            "task.depth.min_depth: not below task.depth.max_depth",
            self.min_depth,
            f"less than {self.max_depth} metres",
            beside=("task.depth.max_depth",),
        )
        nearest, farthest = self.valid_range
        require(
            self.valid_range == (0, 0) or 0 <= nearest < farthest,
            "task.depth.valid_range: invalid range",
            self.valid_range,
            "two numbers of metres, the smaller first, or 0 0",
        )
        at_least("task.depth.head_width", self.head_width, 1, "channels")
        require(
            self.test_windows == 0 or self.test_windows > 1,
            "task.depth.test_windows: invalid number of windows",
            self.test_windows,
            "2 or more, or 0 for none",
        )
        require(
            self.bottom_crop == (0, 0) or min(self.bottom_crop) > 0,
            "task.depth.bottom_crop: invalid lengths",
            self.bottom_crop,
            "two numbers of pixels above 0, or 0 0 for no crop",
        )
        within("task.depth.loss_lambda", self.loss_lambda, "[0, 1]")
        within("task.depth.cut_depth", self.cut_depth, "[0, 1]")


HOW_TO_TEST = tuple(
    f"task.depth.{name}"
    for name in ("val_list", "min_depth", "test_windows", "test_flip", "test_crop")
)
METRICS = {
    "loss": "loss",
    "val/rmse": "RMSE (m)",
    "val/abs_rel": "relative error",
    "val/d1": "share within a factor of 1.25",
}
"""The label of each metric in logs and reports, as in `TrainingJob.metrics`."""

KIND = TaskKind(
    name="depth",
    folder="depth",
    job="depth.job.DepthJob",
    stored="depth.stored.StoredDepth",
    transfer="dense.transfer.DenseTransfer",
    title="Depth",
    section=Depth,
    may_change=("task.depth.train_list", *HOW_TO_TEST),
    scores_runs=True,
    depends_on_passes=True,
    ignored_fields=IGNORED_FIELDS,
    check_names=partial(check_head, task="depth"),
    metrics=lambda _: METRICS,
    lower_is_better=("loss", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog"),
    scoring_fields=(
        *HOW_TO_TEST,
        "task.depth.depth_scale",
        "task.depth.valid_range",
        "task.depth.bottom_crop",
        "student.architecture.window_size",
        "student.stage_windows",
    ),
    next_steps=(
        (
            "nine scores, and pictures of depth and error",
            ("evaluate", "{run}", "--out", "{run}/evaluation"),
        ),
        (
            "predictions for an image of your own",
            ("predict", "{run}", "IMAGE.jpg", "--out", "{run}/predictions"),
        ),
    ),
)

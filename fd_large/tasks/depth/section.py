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

    # Text file with a line for each training image: the path of the image and the path of its depth
    # file, below data.root. Empty: the images and depth files of the folder itself (docs/depth.md).
    train_list: str = ""
    # Text file with a line for each test image, of the same form as train_list. Empty: the test
    # images and depth files of the folder itself.
    val_list: str = ""
    # Number in the depth files that stands for one metre: 1000 if the files hold millimetres, 256
    # in KITTI.
    depth_scale: float = 1000.0
    # Two depths (near, far) in metres. A depth in the files counts as known if it is above near and
    # at most far; other depths count as unknown, as the number 0 does. 0 0: all depths but 0 are
    # known.
    valid_range: tuple[float, float] = (0.0, 0.0)
    # Height and width, in pixels, of the part of an image that is used. The part lies at the
    # bottom, horizontally centred; its size is 352 1216 for KITTI. 0 0: the whole image is used.
    bottom_crop: tuple[int, int] = (0, 0)
    # Largest depth that the head can predict, in metres. The test leaves out pixels with larger
    # depths.
    max_depth: float = 10.0
    # Smallest depth in the test, in metres. The test leaves out pixels with smaller depths.
    min_depth: float = 0.001
    # Whether pixels are normalised by ImageNet's statistics, as in the distillation of students.
    # False: pixel values are between 0 and 1, as in the published runs.
    normalise: bool = True
    # Head that predicts depth from the student's last map. mim: the three transposed convolutions
    # of MIM-Depth. linear: one layer. A head of your own, made from (channels of the map,
    # head_width, stride of the map in pixels): module:FILE.py:NAME.
    head: str = "mim"
    # Number of channels of the head; in mim, the number after the transposed convolutions.
    head_width: int = 128
    # Pixels over which the means in the scale-invariant loss of Eigen are taken. The loss is
    # loss_factor x sqrt(mean d^2 - loss_lambda x (mean d)^2), where d is the difference of the
    # logarithms of true and predicted depth. batch: the pixels of known depth in all images of a
    # step, as published. image: the pixels of one image; the loss is then averaged over the images.
    loss_over: Literal["batch", "image"] = "batch"
    # Factor of the squared mean that the loss subtracts (see loss_over), in [0, 1]. It is 0.5 as
    # published, and 0.85 in BTS and AdaBins. With a larger factor, a wrong scale of all depths
    # costs less.
    loss_lambda: float = 0.5
    # Factor of the loss: 1 as published, 10 in BTS and AdaBins.
    loss_factor: float = 1.0
    # Whether the head alone is trained, and the student keeps its weights. This needs
    # student.drop_path_rate 0.
    frozen: bool = False
    # Whether brightness, contrast, gamma, hue and saturation of training images are changed at
    # random.
    colors: bool = True
    # Fraction of the training images in which a strip of columns shows the depth in place of the
    # image (CutDepth), in [0, 1]. 0 turns CutDepth off.
    cut_depth: float = 0.25
    # Pixel values of a strip of cut_depth. scaled: the depth, scaled so that max_depth becomes 255.
    # wrapped: the numbers of the depth file modulo 256, as in the published code.
    cut_depth_bytes: Literal["scaled", "wrapped"] = "scaled"
    # Number of square windows in which an image is tested, 2 or more. They have sides of
    # data.image_size and are spread over the longer side of the image; further windows are added if
    # they leave gaps. 0: the image is tested whole, which a student of one image size, such as a
    # ViT, does not support.
    test_windows: int = 0
    # Whether each image or window is also tested mirrored, and the two predictions are averaged.
    test_flip: bool = True
    # Part of an image that is scored. none: the whole image. nyu: the image without the borders of
    # NYUv2's images. kitti_garg, kitti_eigen: the two crops of KITTI's published scores.
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

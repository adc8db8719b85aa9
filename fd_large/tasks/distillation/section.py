"""What a recipe says of a distillation, and what others may know of it without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fd_large.recipes.fields import at_least, check_types, positive
from fd_large.recipes.sections import AUTO, FrozenModel
from fd_large.recipes.task_kind import TaskKind


@dataclass(frozen=True, kw_only=True)
class Teacher(FrozenModel):
    """The frozen model whose last feature map is the target."""

    # Where the weights are held. replicated: whole on every rank. sharded: split over all ranks.
    # node: split over the ranks of a node, whole in every node.
    placement: Literal["replicated", "sharded", "node"] = "replicated"
    # Data type of weights and matrix products. auto: the data type of the student's matrix
    # products.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Data type of the residual stream. compute: that of the weights, as in the official code, where
    # it is float16. float32: no sum of a block's output with its input is rounded. Models of
    # libraries have no choice.
    residual_dtype: Literal["compute", "float32"] = "compute"


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss between the projected student map and the normalised teacher map."""

    # Which map of the teacher is learnt. last: the one after its final norm. before_norm: the one
    # that this norm is given, of models of this package's own families.
    layer: Literal["last", "before_norm"] = "last"
    # The loss. smooth_l1: quadratic up to beta, linear above. mse, l1: the mean squared or absolute
    # difference. cosine: one minus the cosine of two tokens. cosine_of_map: that of two whole maps.
    # A sum of these by weight: "0.9 cosine_of_map + 0.1 smooth_l1". A function of your own, from
    # (projected, target) to a scalar: module:FILE.py:NAME (docs/extending.md).
    loss: str = "smooth_l1"
    # What is done to the teacher's tokens. whitening: each gets mean 0 and variance 1 over its
    # channels. none: nothing. standardise: each channel gets mean 0 and variance 1. phi_s: channels
    # are rotated so that all have variance 1. A function of your own: module:FILE.py:NAME.
    normaliser: str = "whitening"
    # File of means, deviations and the rotation of the teacher's channels, for standardise and
    # phi_s: the command statistics writes it.
    target_statistics: str = ""
    # What maps the student's tokens to the teacher's width; it is trained and then discarded.
    # linear: one linear layer. mlp: two, with a norm and GELU between; mlp_relu: with a norm and
    # ReLU. attention_mlp: two transformer blocks and mlp. block: one transformer block and a linear
    # layer. A module of your own, made of (width, teacher_width): module:FILE.py:NAME.
    head: str = "linear"
    # Difference, in units of the target, above which smooth L1 is linear rather than quadratic.
    beta: float = 2.0
    # Constant added to a teacher token's variance before its square root divides the token.
    whitening_eps: float = 1e-5
    # What to do if student and teacher have different grids of tokens. none: stop with an error.
    # bilinear: resize the teacher's map to the student's grid. auto: bilinear if they differ at the
    # teacher's image size.
    interpolation: Literal["none", "bilinear", "auto"] = "none"
    # Side of the teacher's image, in pixels, resized from the same crop. 0 uses the student's
    # image. auto: the size at which both grids agree, where the teacher takes it (docs/weights.md
    # has the rule).
    teacher_image_size: int | Literal["auto"] = 0

    def __post_init__(self) -> None:
        check_types(self, "objective")
        positive("objective.beta", self.beta)
        positive("objective.whitening_eps", self.whitening_eps)
        if self.teacher_image_size != AUTO:
            at_least("objective.teacher_image_size", self.teacher_image_size, 0, "pixels, or auto")


# The teacher decides its image size and how the two grids meet: what recipes of distillation say.
AUTOMATIC = Objective(interpolation=AUTO, teacher_image_size=AUTO)

KIND = TaskKind(
    name="distillation",
    folder="distillation",
    job="DistillationJob",
    title="Distillation",
    sections=("teacher", "objective"),
    # The hash of a file of statistics decides, not its place.
    may_change=("teacher.placement", "objective.target_statistics"),
    next_steps=(
        (
            "what student and teacher attend to, and how alike their layers are",
            (
                *("diagnose", "{run}", "{run}#teacher", "--data.root", "{data.root}"),
                *("--out", "{run}/diagnosis"),
            ),
        ),
        (
            "student and teacher on labelled images (train/ and val/, a folder for each class)",
            (
                *("evaluate", "{run}", "{run}#teacher", "--task", "knn"),
                *("--data.root", "LABELLED_FOLDER", "--out", "{run}/evaluation"),
            ),
        ),
        ("the student for other programs", ("export", "{run}", "{run}/export", "--to", "timm")),
    ),
)

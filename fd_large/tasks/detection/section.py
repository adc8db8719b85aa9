"""The recipe's section `task.detection`, and the description of the task; needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from fd_large.recipes.fields import at_least, check_types, require
from fd_large.recipes.task_kind import TaskKind
from fd_large.tasks.dense.section import (
    IGNORED_FIELDS,
    check_head,
    check_scale_range,
    check_test_scales,
    check_test_size,
)

HEADS_SETTINGS: dict[str, dict[str, str]] = {
    "cascade": {"cascade_form": "form", "box_loss": "box_loss", "class_agnostic": "class_agnostic"},
    "htc": {name: name for name in ("box_loss", "class_agnostic", "semantic_classes")},
}
"""For each built-in kind of heads, its settings: {field of the section: argument of the class}."""


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Settings of detection: a two-stage detector of boxes and masks on the student's features."""

    # Number of object classes. COCO has 80.
    num_classes: int = 80
    # Heads that predict classes, boxes and masks from proposals: mask_rcnn, cascade (Cascade Mask
    # R-CNN) or htc (Hybrid Task Cascade). Heads of your own, with the methods of
    # RoIHeads (fd_large/tasks/detection/heads/roi_heads.py): module:FILE.py:NAME.
    heads: str = "mask_rcnn"
    # Published form of the heads cascade. mmdet: each stage draws its own sample of proposals and
    # has its own mask head, and logits of the stages are averaged. detectron2: all stages share one
    # sample and one mask head, and probabilities are averaged.
    cascade_form: Literal["mmdet", "detectron2"] = "mmdet"
    # Loss of the boxes in the heads cascade and htc. l1, smooth_l1: the loss of the predicted box
    # deltas. giou: one minus the generalized intersection over union of predicted and true boxes,
    # times 10.
    box_loss: Literal["l1", "smooth_l1", "giou"] = "smooth_l1"
    # Whether the heads cascade and htc predict one box for each proposal instead of one box for
    # each class.
    class_agnostic: bool = True
    # Number of classes of the semantic branch of htc. COCO-Stuff has 183. The branch learns from
    # stuffthingmaps/train2017/*.png beside the images. 0 leaves the branch out.
    semantic_classes: int = 0
    # Whether an attention layer over the whole map of stride 32 precedes the feature pyramid, as in
    # HTC++.
    extra_attention: bool = False
    # Number of channels of the feature pyramid and of the convolutions in the heads.
    head_width: int = 256
    # Number of anchors per image that count in the losses of the region proposal network.
    anchors_per_image: int = 256
    # Largest number of proposals that are kept per image.
    proposals_per_image: int = 1000
    # Number of proposals per image that count in the losses of classes, boxes and masks.
    rois_per_image: int = 512
    # How a test treats overlapping boxes of a class. hard: of overlapping boxes, only the box with
    # the best score is kept. linear, gaussian: soft-NMS, which lowers the scores of the other
    # boxes; the scores published for COCO use it with a least_score of 0.001.
    nms: Literal["hard", "linear", "gaussian"] = "hard"
    # Intersection over union of two boxes, in [0, 1]: hard drops a box above it, and linear lowers
    # the score of a box from it on. The NMS gaussian does not use it.
    nms_iou: float = 0.5
    # Score in [0, 1]; boxes with this score or less are dropped before NMS.
    least_score: float = 0.05
    # Whether the score of a box is multiplied by the mean probability inside its
    # mask (EVA-02's "maskness"). This raises the mask AP and lowers the box AP.
    rescore_by_masks: bool = False
    # Largest number of boxes that are reported per image. COCO's evaluation counts at most 100.
    detections_per_image: int = 100
    # Smallest and largest scale to which a training image is resized before it is cropped to
    # data.image_size. At scale 1 the whole image just fits into the crop.
    scale_range: tuple[float, float] = (0.1, 2.0)
    # Probability, for each training image, that its objects are cut out and pasted back slightly
    # scaled, rotated and shifted, as in InstaBoost, whose authors use 0.5. 0 turns this off.
    copy_instances: float = 0.0
    # Sizes of whole training images, in place of random scales and crops: the smallest and the
    # largest length of the shorter side, and the largest length of the longer side, in pixels. A
    # global batch then holds only wide images or only high images. 0 0 0 turns this off.
    whole_size: tuple[int, int, int] = (0, 0, 0)
    # Length of the shorter side of a tested image, and largest length of its longer side, in
    # pixels. 0 0: data.image_size for both.
    test_size: tuple[int, int] = (0, 0)
    # Scales at which an image is tested, as multiples of test_size. The results of several scales
    # are merged by test_merge.
    test_scales: tuple[float, ...] = (1.0,)
    # Whether an image is also tested mirrored, at each scale.
    test_flip: bool = False
    # How the results for several views of an image (scales and mirrored images) are merged.
    # average: every view gets the best proposals of all views, and boxes, scores and masks are
    # averaged. areas: the boxes of all views are put together before NMS, and test_areas limits the
    # boxes of each scale by their areas. union: the boxes of all views after NMS are put together,
    # and NMS runs once more.
    test_merge: Literal["average", "areas", "union"] = "average"
    # Areas of the boxes that each scale contributes, with test_merge areas: an entry of letters for
    # each scale, such as l ml sm for three scales. The letter s stands for areas up to 32 x 32
    # pixels of the image file, m for larger areas up to 96 x 96, and l for areas above. Empty: each
    # scale contributes boxes of all areas.
    test_areas: tuple[str, ...] = ()
    # Number of stages of a SwinV2 student, counted from the first, that compute attention for a few
    # windows at a time. This saves memory if the attention maps of all windows would not fit. 0
    # turns this off.
    sequential_stages: int = 0

    def __post_init__(self) -> None:
        check_types(self, "task.detection")
        for name, unit in (
            ("num_classes", "classes"),
            ("anchors_per_image", "anchors"),
            ("proposals_per_image", "proposals"),
            ("rois_per_image", "proposals"),
            ("detections_per_image", "boxes"),
        ):
            at_least(f"task.detection.{name}", getattr(self, name), 1, unit)
        for name in ("nms_iou", "least_score", "copy_instances"):
            value = getattr(self, name)
            where = f"task.detection.{name}"
            require(0 <= value <= 1, f"{where}: out of range", value, "a number in [0, 1]")
        at_least("task.detection.head_width", self.head_width, 4, "channels")
        require(
            0 <= self.semantic_classes <= 255,
            "task.detection.semantic_classes: out of range",
            self.semantic_classes,
            "0 to 255",
        )
        at_least("task.detection.sequential_stages", self.sequential_stages, 0, "stages")
        for name in {name for names in HEADS_SETTINGS.values() for name in names}:
            value, default = getattr(self, name), getattr(type(self), name)
            heads = [heads for heads, names in HEADS_SETTINGS.items() if name in names]
            require(
                value == default or self.heads in heads,
                f"task.detection.{name}: not a setting of heads {self.heads!r}",
                value,
                f"{default!r}, or task.detection.heads {' or '.join(heads)}",
                beside=("task.detection.heads",),
            )
        require(
            self.cascade_form == "mmdet" or self.class_agnostic,
            "task.detection.class_agnostic: not possible with cascade_form detectron2",
            self.class_agnostic,
            "true",
            beside=("task.detection.cascade_form",),
        )
        check_scale_range("task.detection", self.scale_range)
        least, most, longer = self.whole_size
        require(
            self.whole_size == (0, 0, 0) or 0 < least <= most <= longer,
            "task.detection.whole_size: invalid lengths",
            self.whole_size,
            "three numbers of pixels in rising order, or 0 0 0",
        )
        require(
            self.whole_size == (0, 0, 0) or self.scale_range == (0.1, 2.0),
            "task.detection.scale_range: not possible with whole_size",
            self.scale_range,
            "only one of the two to be set",
            beside=("task.detection.whole_size",),
        )
        check_test_size("task.detection", self.test_size)
        check_test_scales("task.detection", self.test_scales)
        require(
            not self.test_areas
            or (
                self.test_merge == "areas"
                and len(self.test_areas) == len(self.test_scales)
                and all(areas and not set(areas) - set("sml") for areas in self.test_areas)
            ),
            "task.detection.test_areas: not one entry for each scale",
            self.test_areas,
            f"for each of {len(self.test_scales)} scales some of the letters s, m and l, with "
            "--task.detection.test_merge areas",
            beside=("task.detection.test_merge", "task.detection.test_scales"),
        )


@dataclass(frozen=True, kw_only=True)
class ScoredFiles:
    """Flags of the command `evaluate` that score a file of detections in place of a run."""

    # File of detections in COCO's results format. It is scored without a model, with --annotations
    # and --json.
    detections: str = ""
    # File with COCO's ground truth for --detections.
    annotations: str = ""
    # File to which the scores of --detections are written. Empty: no file is written.
    json: str = ""


HOW_TO_TEST = tuple(
    f"task.detection.{name}"
    for name in (
        *("nms", "nms_iou", "least_score", "rescore_by_masks", "detections_per_image"),
        *("test_size", "test_scales", "test_flip", "test_merge", "test_areas"),
    )
)

METRICS = {
    "loss": "sum of all losses",
    **{f"box/{name}": f"box {name}" for name in ("AP", "AP50", "AP75")},
    **{f"mask/{name}": f"mask {name}" for name in ("AP", "AP50", "AP75")},
}
"""The label of each metric in logs and reports, as in `TrainingJob.metrics`."""

KIND = TaskKind(
    name="detection",
    folder="detection",
    job="detection.job.DetectionJob",
    stored="detection.stored.StoredDetection",
    transfer="transfer.Transfer",
    title="Detection",
    section=Detection,
    # Fields that do not change training.
    may_change=HOW_TO_TEST,
    scores_runs=True,
    predicts_scores=True,
    # The number of proposals is a field of training, too.
    scoring_fields=(*HOW_TO_TEST, "task.detection.proposals_per_image"),
    ignored_fields=IGNORED_FIELDS,
    check_names=partial(check_head, task="detection", field="heads"),
    metrics=lambda _: METRICS,
    scored_files=ScoredFiles,
    next_steps=(
        ("all of COCO's numbers, and pictures", ("evaluate", "{run}", "--out", "{run}/evaluation")),
        (
            "predictions for an image of your own",
            ("predict", "{run}", "IMAGE.jpg", "--out", "{run}/predictions"),
        ),
    ),
)

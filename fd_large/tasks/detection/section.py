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
    # Heads that make classes, boxes and masks of proposals: mask_rcnn, cascade (Cascade Mask R-CNN)
    # or htc (Hybrid Task Cascade). Your own, with the methods of RoIHeads
    # (fd_large/tasks/detection/heads/roi_heads.py): module:FILE.py:NAME.
    heads: str = "mask_rcnn"
    # Published form of a cascade. mmdet: each stage draws its own sample and has its own mask head,
    # logits are averaged. detectron2: one sample, one mask head, probabilities are averaged.
    cascade_form: Literal["mmdet", "detectron2"] = "mmdet"
    # How cascade and htc compare boxes with those of objects: l1 or smooth_l1 of the differences
    # that they predict, or giou (generalized intersection over union, times 10) of the boxes.
    box_loss: Literal["l1", "smooth_l1", "giou"] = "smooth_l1"
    # Whether cascade and htc predict one box for a proposal, instead of one for each class.
    class_agnostic: bool = True
    # Number of classes of the semantic branch of htc, which learns them from
    # stuffthingmaps/train2017/*.png beside the images; COCO-Stuff has 183. 0 leaves the branch out.
    semantic_classes: int = 0
    # Put a layer of attention over the whole map of stride 32 before the pyramid, as HTC++ does.
    extra_attention: bool = False
    # Number of channels of the feature pyramid and of the convolutions in the heads.
    head_width: int = 256
    # Number of anchors per image that enter the losses of the proposal network.
    anchors_per_image: int = 256
    # Number of proposals kept per image.
    proposals_per_image: int = 1000
    # Number of proposals per image that enter the losses of classes, boxes and masks.
    rois_per_image: int = 512
    # How tests choose among overlapping boxes of a class. hard: only the best is kept. linear,
    # gaussian: soft-NMS, which lowers the scores of the others; with a task.detection.least_score
    # of 0.001, as published for COCO.
    nms: Literal["hard", "linear", "gaussian"] = "hard"
    # Overlap (intersection over union) from which hard and linear act.
    nms_iou: float = 0.5
    # Boxes with this score or less are dropped before NMS.
    least_score: float = 0.05
    # Whether the score of a box is multiplied by the mean probability inside its mask: for the mask
    # AP, at the cost of the box AP (EVA-02's "maskness").
    rescore_by_masks: bool = False
    # Largest number of boxes reported per image. COCO's evaluation counts 100.
    detections_per_image: int = 100
    # Smallest and largest scale of a training image before it is cropped to data.image_size, as
    # multiples of the scale at which the whole image just fits.
    scale_range: tuple[float, float] = (0.1, 2.0)
    # Probability that the objects of a training image are cut out and pasted back slightly scaled,
    # turned and shifted, as InstaBoost does. Its authors take 0.5. 0 turns it off.
    copy_instances: float = 0.0
    # Train on whole images instead of random scales and crops: the smallest and largest length of
    # the shorter side, and the largest length of the longer side, in pixels. A global batch then
    # holds only wide or only high images. 0 0 0 turns it off.
    whole_size: tuple[int, int, int] = (0, 0, 0)
    # Length of the shorter side of evaluated images, and the largest length of the longer side, in
    # pixels. 0 0 uses data.image_size for both.
    test_size: tuple[int, int] = (0, 0)
    # Scales at which an image is tested, as multiples of the size above. The results of several
    # scales are merged.
    test_scales: tuple[float, ...] = (1.0,)
    # Whether the image is also seen mirrored at each scale.
    test_flip: bool = False
    # How several views are merged. average: the best proposals of all views are given to each, and
    # boxes, scores and masks are averaged. areas: the boxes of all views are put together, those of
    # each scale if they have its areas, before overlapping ones are chosen. union: the boxes that
    # each view reports are put together, and overlapping ones are chosen once more.
    test_merge: Literal["average", "areas", "union"] = "average"
    # For `areas`: which boxes each scale gives, by letters: s up to 32 x 32 pixels of the file, m
    # up to 96 x 96, l above. For example l ml sm for three scales. Empty: all.
    test_areas: tuple[str, ...] = ()
    # Number of first stages of a SwinV2 student whose attention is computed for few windows at a
    # time, for attention maps that would fill the memory. 0 turns it off.
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

    # File in COCO's results format that is scored without a model, with --annotations and --json.
    detections: str = ""
    # COCO's ground truth for --detections.
    annotations: str = ""
    # File for the scores of --detections; empty: they are not written.
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

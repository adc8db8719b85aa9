"""The parts of the section `task` that belong to one task each: fine-tuning and detection.

Standard library only. The comment over a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fd_large.recipes.fields import at_least, check_types, not_negative, require


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """Classification of labelled images by the whole model; data.root has train/, val/ or test/."""

    # RandAugment's magnitude, 0 to 10, of two operations an image; 0: off.
    randaugment: float = 9.0
    # Spread of the magnitude from operation to operation.
    randaugment_std: float = 0.5
    # Probability that a box of 2% to 33% of an image is filled with noise.
    erasing: float = 0.25
    # Alpha of the beta distribution of mixup's shares, at most 2; 0: no mixup.
    mixup: float = 0.8
    # The same of CutMix; 0: no CutMix.
    cutmix: float = 1.0
    # Probability that a global batch is cut rather than mixed, where both are on.
    switch_probability: float = 0.5
    # Probability that is taken from a label and spread over all classes.
    smoothing: float = 0.1
    # Mean and standard deviation of red, green and blue by which images are normalised, in training
    # and in tests; empty: those that the student's weights were trained with, else ImageNet's.
    statistics: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_types(self, "task.finetune")
        not_negative("task.finetune.randaugment_std", self.randaugment_std)
        for name, most in (("randaugment", 10), ("mixup", 2), ("cutmix", 2)):
            value = getattr(self, name)
            require(
                0 <= value <= most, f"task.finetune.{name}: out of range", value, f"0 to {most}"
            )
        for name in ("erasing", "switch_probability", "smoothing"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"task.finetune.{name}: out of range", value, "0 to 1")
        require(
            len(self.statistics) in (0, 6) and all(value > 0 for value in self.statistics[3:]),
            "task.finetune.statistics: no means and deviations of three channels",
            self.statistics,
            "six numbers, the last three above 0, or none",
        )


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Boxes and masks of objects: Mask R-CNN on the student's features."""

    # Classes of objects; COCO has 80.
    num_classes: int = 80
    # Channels of the pyramid and of the convolutions in the heads.
    head_width: int = 256
    # Anchors of an image that the losses of its proposals look at.
    anchors_per_image: int = 256
    # Proposals of an image that are kept.
    proposals_per_image: int = 1000
    # Proposals of an image that the losses of classes, boxes and masks look at.
    rois_per_image: int = 512
    # Boxes of an image that are found at most; COCO counts 100.
    detections_per_image: int = 100
    # Smallest and largest size of a training image before it is cut to data.image_size, as a
    # multiple of the size at which it just fits in.
    scale_range: tuple[float, float] = (0.1, 2.0)
    # Instead of scale_range and the cut: the shorter side of whole training images, smallest and
    # largest, and the most that the longer may be, in pixels; a global batch then holds wide
    # images or high ones. 0 0 0: jitter and cut.
    whole_size: tuple[int, int, int] = (0, 0, 0)
    # Shorter side of evaluated images, and the most that the longer may be, in pixels; 0 0: both
    # data.image_size.
    test_size: tuple[int, int] = (0, 0)
    # First stages of a SwinV2 student whose attention is computed for few windows at a time, where
    # those maps would fill the memory.
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
        at_least("task.detection.head_width", self.head_width, 4, "channels")
        at_least("task.detection.sequential_stages", self.sequential_stages, 0, "stages")
        smallest, largest = self.scale_range
        require(
            0 < smallest <= largest,
            "task.detection.scale_range: no range",
            self.scale_range,
            "two numbers above 0, the smaller first",
        )
        least, most, longer = self.whole_size
        require(
            self.whole_size == (0, 0, 0) or 0 < least <= most <= longer,
            "task.detection.whole_size: no sides of an image",
            self.whole_size,
            "three rising numbers of pixels, or 0 0 0",
        )
        require(
            self.whole_size == (0, 0, 0) or self.scale_range == (0.1, 2.0),
            "task.detection.scale_range: not together with whole_size",
            self.scale_range,
            "one of the two",
        )
        shorter, longer = self.test_size
        require(
            self.test_size == (0, 0) or 0 < shorter <= longer,
            "task.detection.test_size: no sides of an image",
            self.test_size,
            "two numbers of pixels, the smaller first, or 0 0",
        )

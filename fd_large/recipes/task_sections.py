"""The parts of the section `task` that belong to one task each: fine-tuning and detection.

Standard library only. The comment over a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fd_large.recipes.fields import check_types, not_negative, require


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """Classification of labelled pictures by the whole net; data.root has train/, val/ or test/."""

    # RandAugment's magnitude, 0 to 10, of two operations a picture; 0: off.
    randaugment: float = 9.0
    # Spread of the magnitude from operation to operation.
    randaugment_std: float = 0.5
    # Probability that a box of 2% to 33% of a picture is filled with noise.
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

    def __post_init__(self) -> None:
        check_types(self, "task.detection")

"""The parts of the section `task` that belong to one task each: fine-tuning and detection.

Standard library only. The comment over a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fd_large.recipes.fields import check_types


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """Classification of labelled pictures by the whole net."""

    def __post_init__(self) -> None:
        check_types(self, "task.finetune")


@dataclass(frozen=True, kw_only=True)
class Detection:
    """Boxes and masks of objects: Mask R-CNN on the student's features."""

    def __post_init__(self) -> None:
        check_types(self, "task.detection")

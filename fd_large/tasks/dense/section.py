"""Checks of recipe fields that tasks with dense targets share; this file does not import torch."""

from __future__ import annotations

from typing import Any

from fd_large import doors
from fd_large.recipes.fields import require
from fd_large.recipes.tables import keys_of
from fd_large.recipes.task_kind import OF_FEW_LABELS, OF_VIEWS_WITHOUT_LABELS

IGNORED_FIELDS = (
    *(*OF_VIEWS_WITHOUT_LABELS, *OF_FEW_LABELS),
    "data.min_crop_scale",
)
"""Fields of the recipe that tasks with dense targets do not read."""


def check_head(run: Any, *, task: str, field: str = "head") -> None:
    """Checks that a recipe names a known head, without importing the head or torch.

    Args:
        run: A recipe of the task.
        task: Name of the task, which is also the name of its folder and of its section.
        field: The field of the section that names the head.

    Raises: ConfigError: if the name is unknown; the message has the nearest known names.
    """
    doors.require_known(
        getattr(getattr(run.task, task), field),
        kind="heads",
        where=f"task.{task}.{field}",
        built_in=keys_of(f"tasks/{task}/task.py", "HEADS"),
    )


def check_scale_range(where: str, scale_range: tuple[float, float]) -> None:
    """Checks that scales of training images are an ascending range above 0.

    Args:
        where: The section, for the message.
        scale_range: The smallest and the largest scale.

    Raises: ConfigError: if the range is invalid.
    """
    smallest, largest = scale_range
    require(
        0 < smallest <= largest,
        f"{where}.scale_range: invalid range",
        scale_range,
        "two numbers above 0, the smaller first",
    )


def check_test_size(where: str, test_size: tuple[int, int]) -> None:
    """Checks the size of test images.

    Args:
        where: The section, for the message.
        test_size: The length of the shorter side and the largest length of the longer side, in
            pixels; (0, 0) for the default.

    Raises: ConfigError: if the size is invalid.
    """
    shorter, longer = test_size
    require(
        test_size == (0, 0) or 0 < shorter <= longer,
        f"{where}.test_size: invalid lengths",
        test_size,
        "two numbers of pixels, the smaller first, or 0 0",
    )


def check_test_scales(where: str, scales: tuple[float, ...]) -> None:
    """Checks that there are scales of test images, all above 0.

    Args:
        where: The section, for the message.
        scales: The scales.

    Raises: ConfigError: if the scales are invalid.
    """
    require(
        bool(scales) and all(scale > 0 for scale in scales),
        f"{where}.test_scales: invalid scales",
        scales,
        "at least one number above 0",
    )

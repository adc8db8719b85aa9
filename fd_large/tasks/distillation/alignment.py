"""Makes two feature maps comparable token by token: one grid, matched prefix tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fd_large.backbones.feature_map import FeatureMap
from fd_large.errors import ConfigError, ShapeError

INTERPOLATIONS = ("none", "bilinear")


def check_grids(
    student: tuple[int, int], teacher: tuple[int, int], *, interpolation: str = "none"
) -> None:
    """Refuses maps that cannot be aligned.

    Args:
        student: Rows and columns of the student's map.
        teacher: Rows and columns of the teacher's map.
        interpolation: "none" or "bilinear".

    Raises: ShapeError: if the grids differ and interpolation is "none"; ConfigError: if it is
        neither of the two.
    """
    if interpolation not in INTERPOLATIONS:
        raise ConfigError(
            f"objective.interpolation: unknown mode; got {interpolation!r}, expected one of "
            f"{', '.join(INTERPOLATIONS)}. Choose one of these."
        )
    if student != teacher and interpolation == "none":
        raise ShapeError(
            "distill: the student's grid differs from the teacher's; got "
            f"{student[0]}x{student[1]} and {teacher[0]}x{teacher[1]}, expected equal grids. Set "
            "--data.image_size or --objective.teacher_image_size so that both agree, or "
            "--objective.interpolation bilinear to resize the teacher's map."
        )


def align(
    student: FeatureMap, teacher: FeatureMap, *, interpolation: str = "none"
) -> tuple[Tensor, Tensor]:
    """Returns the tokens of two maps, (B, N, Cs) and (B, N, Ct), that stand for the same places.

    Equal numbers of prefix tokens (CLS) are matched one to one; otherwise both maps drop theirs.
    With "bilinear" interpolation the teacher's map is resized to the student's grid, before
    whitening, so that the targets have unit variance per token.

    Raises: ShapeError: if the grids differ and interpolation is "none".
    """
    check_grids(student.grid, teacher.grid, interpolation=interpolation)
    prefixes_agree = student.num_prefix_tokens == teacher.num_prefix_tokens
    if prefixes_agree and student.grid == teacher.grid:
        return student.tokens, teacher.tokens
    student_prefix, student_patches = _split(student)
    teacher_prefix, teacher_patches = _split(teacher)
    if student.grid != teacher.grid:
        h, w = teacher.grid
        image = rearrange(teacher_patches.float(), "b (h w) c -> b c h w", h=h, w=w)
        image = F.interpolate(
            image, size=student.grid, mode="bilinear", align_corners=False, antialias=True
        )
        teacher_patches = rearrange(image, "b c h w -> b (h w) c").to(teacher.tokens.dtype)
    if not prefixes_agree:
        return student_patches, teacher_patches
    return (
        torch.cat([student_prefix, student_patches], dim=1),
        torch.cat([teacher_prefix, teacher_patches], dim=1),
    )


def _split(feature_map: FeatureMap) -> tuple[Tensor, Tensor]:
    k = feature_map.num_prefix_tokens
    return feature_map.tokens[:, :k], feature_map.tokens[:, k:]

"""Aligns two feature maps token by token: resizes their grids and matches their prefix tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.resize import resize_images
from fd_large.errors import ConfigError, ShapeError

INTERPOLATIONS = ("none", "bilinear", "bilinear_student", "bilinear_larger")

Grid = tuple[int, int]


def teacher_side(
    student: Grid, grid_at: Callable[[int], Grid | None], *, image_size: int, own_size: int
) -> int:
    """Returns the side in pixels to which the student's images are resized for the teacher.

    The result is the first of these sides that the teacher accepts:

    1. The side of the student's images, if the two grids are equal at this side.
    2. The side at which the grids are equal, if it is more than half the side of the student's
       images, and at most twice the side in the teacher's training (twice the side of the student's
       images if the side in training is unknown). Larger images would only show enlarged pixels.
    3. The side in the teacher's training, if it is larger than the student's images, and if the
       teacher's map of the student's images would have fewer rows than the student's map.
    4. The side of the student's images.
    5. The side in the teacher's training.

    If the teacher accepts none of these sides, the result is the side of the student's images. In
    cases 3 to 5 the grids differ, so that a map must be resized.

    Args:
        student: Rows and columns of the student's map.
        grid_at: Returns the teacher's grid for images of a side, or None if the teacher rejects
            this side.
        image_size: Side of the student's images, in pixels.
        own_size: Side of the images in the teacher's training, in pixels; 0 if unknown.
    """
    here, own_grid = grid_at(image_size), grid_at(own_size) if own_size else None
    if here == student:
        return image_size
    side, grid = (own_size, own_grid) if here is None else (image_size, here)
    if grid is None:
        return image_size
    agreed = side // grid[0] * student[0]
    is_fine = image_size < 2 * agreed and agreed <= 2 * (own_size or image_size)
    if is_fine and grid_at(agreed) == student:
        return agreed
    is_coarser = own_grid is not None and grid[0] < student[0] and image_size < own_size
    return own_size if here is None or is_coarser else image_size


def align(
    student: FeatureMap,
    teacher: FeatureMap,
    *,
    interpolation: str = "none",
    with_prefix: bool = True,
) -> tuple[FeatureMap, FeatureMap]:
    """Returns the maps (`student`, `teacher`) with equal grids and numbers of prefix tokens (CLS).

    The tokens of the results have the shapes (B, N, Cs) and (B, N, Ct). If the numbers of prefix
    tokens differ, or `with_prefix` is False, both maps lose their prefix tokens.

    Different grids are made equal by `interpolation`. With "bilinear" the teacher's map is resized
    to the student's grid. With "bilinear_student" the student's map, which has passed the head, is
    resized to the teacher's grid, as in lightly-train. With "bilinear_larger" the map with fewer
    patches is resized to the grid with more patches, as in SAK (arXiv 2410.14633). The teacher's
    map must not be whitened yet, so that every target token has unit variance after resizing.

    Raises:
        ShapeError: if the grids differ and interpolation is "none".
        ConfigError: if the interpolation is unknown.
    """
    if not with_prefix or student.num_prefix_tokens != teacher.num_prefix_tokens:
        student, teacher = (
            FeatureMap(_split(map_)[1], map_.grid, 0) for map_ in (student, teacher)
        )
    grid = common_grid(student.grid, teacher.grid, interpolation=interpolation)
    return resized(student, grid, antialias=False), resized(teacher, grid, antialias=True)


def common_grid(student: Grid, teacher: Grid, *, interpolation: str = "none") -> Grid:
    """Returns the rows and columns of the grid on which two maps are compared; see `align`.

    Args:
        student: Rows and columns of the student's map.
        teacher: Rows and columns of the teacher's map.
        interpolation: One of `INTERPOLATIONS`.

    Raises:
        ShapeError: if the grids differ and interpolation is "none".
        ConfigError: if the interpolation is unknown.
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
    is_coarser = math.prod(student) < math.prod(teacher)
    if interpolation == "bilinear_student" or (interpolation == "bilinear_larger" and is_coarser):
        return teacher
    return student


def resized(map_: FeatureMap, grid: Grid, *, antialias: bool) -> FeatureMap:
    """Returns `map_` resized to `grid` by bilinear interpolation; its prefix tokens stay the same.

    Args:
        map_: The map.
        grid: Rows and columns of the result's patches.
        antialias: Whether the interpolation filters the map before it makes a grid smaller.
    """
    if map_.grid == grid:
        return map_
    prefix, patches = _split(map_)
    h, w = map_.grid
    image = rearrange(patches, "b (h w) c -> b c h w", h=h, w=w)
    image = resize_images(image, grid, antialias=antialias)
    patches = rearrange(image, "b c h w -> b (h w) c")
    if map_.num_prefix_tokens:
        patches = torch.cat([prefix, patches], dim=1)
    return FeatureMap(patches, grid, map_.num_prefix_tokens)


def _split(feature_map: FeatureMap) -> tuple[Tensor, Tensor]:
    """Returns the prefix tokens, (B, P, C), and the patches, (B, H * W, C), of `feature_map`."""
    k = feature_map.num_prefix_tokens
    return feature_map.tokens[:, :k], feature_map.tokens[:, k:]

"""Prepares a distilled student for dense tasks, computes its maps, and chooses the neck.

The student's parameters keep their names, so that its weights load unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.engine.student import FINAL_NORM
from fd_large.errors import ConfigError
from fd_large.tasks.dense.pyramids import (
    FeaturePyramid,
    NormedStages,
    RescaledMaps,
    SimplePyramid,
)
from fd_large.tasks.dense.windowed_vit import check, windowed_map

NUM_STAGES = 4
# Parameters that `strip` removes from a distilled student, with the values that they have in an
# export of the whole student, whose final norm then only normalises.
LEFT_OUT = {**FINAL_NORM, "cls_token": 0.0, "dist_token": 0.0, "reg_token": 0.0}


def strip(student: nn.Module, *, windowed: bool = True) -> None:
    """Removes the parameters of a student that a dense task does not use.

    These parameters are the final norm and, if the student's blocks will attend within windows, the
    class tokens. They would get no gradient, but DeepSpeed would still apply weight decay to them.

    Args:
        student: A backbone with a map for each stage (`stage_widths`, `stage_strides`), each of
            half the previous resolution, or a backbone with a single map whose blocks can attend
            within windows (`attends_in_windows`).
        windowed: Whether a student with a single map will attend within windows (`features`). If
            False, it will keep its class tokens and run on whole images of its own size
            (`maps_of_blocks`).

    Raises: ConfigError: if no pyramid can be built on the student.
    """
    if has_stages(student):
        stages, size_rule = len(student.stage_widths), getattr(student, "size_rule", "pad")
        if stages != NUM_STAGES or size_rule != "pad":
            raise ConfigError(
                f"student.model: the pyramid needs {NUM_STAGES} stages, and images of any size; "
                f"got {stages} stages, size_rule {size_rule!r}, expected {NUM_STAGES} and 'pad'. "
                "Set --student.model and --student.size_rule."
            )
        if hasattr(student, "check_stages"):
            student.check_stages()
    elif getattr(student, "attends_in_windows", False):
        if windowed:
            check(student)
            student.cls_token = student.dist_token = student.reg_token = None
    else:
        raise ConfigError(
            f"student.model: no pyramid for this model; got {type(student).__name__}, "
            "expected a model for images of any size, such as swinv2_base. Set --student.model."
        )
    student.norm = None


def features(
    student: nn.Module, pixels: Tensor, keep: Tensor | None
) -> Tensor | tuple[Tensor, ...]:
    """Runs a student on images of any size, and returns the pyramid's input.

    Args:
        student: The student, after `strip`.
        pixels: (B, 3, H, W), normalised, of any floating-point dtype.
        keep: (num_sites, B) bool, the branches that drop path keeps; None to keep all branches.

    Returns: the maps (B, H, W, C) of all stages, or the only map of a student without stages.
    """
    pixels = pixels.to(next(student.parameters()).dtype)
    if has_stages(student):
        return student.stages(pixels, keep)
    return windowed_map(student, pixels, keep)


def blocks_taken(depth: int) -> tuple[int, int, int, int]:
    """Returns the four blocks of a plain ViT whose maps a dense head reads, counted from 0.

    The blocks are the last blocks of the first third, the first half, the first two thirds and the
    whole of the model: blocks 3, 5, 7, 11 of 12 and blocks 7, 11, 15, 23 of 24, as published.

    Args:
        depth: Number of the ViT's blocks.
    """
    return (
        max(depth // 3 - 1, 0),
        max(depth // 2 - 1, 0),
        max(2 * depth // 3 - 1, 0),
        depth - 1,
    )


def maps_of_blocks(
    vit: nn.Module, pixels: Tensor, keep: Tensor | None, blocks: Sequence[int]
) -> list[Tensor]:
    """Runs a ViT on images of its own size, and returns the maps after some blocks.

    Every token attends to all tokens of the image, including class tokens.

    Args:
        vit: The ViT, after `strip`.
        pixels: (B, 3, H, W), normalised, of any floating-point dtype; smaller images are padded
            (`at_own_size`).
        keep: (num_sites, B) bool, the branches that drop path keeps; None to keep all branches.
        blocks: Numbers of the blocks, counted from 0, in ascending order.

    Returns: for each block its map (B, H / p, W / p, C) without a norm, where p is the patch size.
    """
    rows, columns = vit.image_grid
    pixels = at_own_size(vit, pixels).to(next(vit.parameters()).dtype)
    taken = {
        number: tokens[:, -rows * columns :].unflatten(1, (rows, columns))
        for number, tokens in enumerate(vit.after_blocks(pixels, keep))
        if number in blocks
    }
    # With few blocks, one may be named several times.
    return [taken[block] for block in blocks]


def normed_last_map(student: nn.Module, pixels: Tensor, keep: Tensor | None) -> Tensor:
    """Runs a whole student on images, and returns its last map after the final norm.

    Args:
        student: A backbone to which `strip` was not applied.
        pixels: (B, 3, H, W), normalised, of any floating-point dtype; padded by `at_own_size`.
        keep: (num_sites, B) bool, the branches that drop path keeps; None to keep all branches.

    Returns: (B, C, h, w) without class tokens.
    """
    last = student(at_own_size(student, pixels).to(next(student.parameters()).dtype), keep)
    tokens = last.tokens[:, last.num_prefix_tokens :]
    return tokens.unflatten(1, last.grid).permute(0, 3, 1, 2)


def to_pixels(student: nn.Module, logits: Tensor, pixels: Tensor) -> Tensor:
    """Resizes a head's output bilinearly to the pixels of the images.

    Args:
        student: The student, which may have padded the images (`at_own_size`).
        logits: (B, K, h, w), the head's output for the padded images.
        pixels: (B, 3, H, W), the images before padding.

    Returns: (B, K, H, W), from which the padding is cut off.
    """
    size = at_own_size(student, pixels).shape[-2:]
    if logits.shape[-2:] != size:
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return logits[..., : pixels.shape[-2], : pixels.shape[-1]]


def at_own_size(student: nn.Module, pixels: Tensor) -> Tensor:
    """Pads pixels (B, 3, H, W) with zeros, at right and bottom, to the student's fixed size.

    If the student has no fixed size (`is_of_one_size`), the pixels are returned unchanged.
    """
    if not is_of_one_size(student):
        return pixels
    rows, columns = (side * student.patch_size for side in student.image_grid)
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, max(columns - width, 0), 0, max(rows - height, 0)))


def is_of_one_size(student: nn.Module) -> bool:
    """Whether a student accepts whole images of a single size only, as a ViT does."""
    return not has_stages(student) and hasattr(student, "image_grid")


def scales_of(patch_size: int) -> tuple[float, ...]:
    """Returns the factors by which the sides of a plain ViT's four maps are scaled, as published.

    Args:
        patch_size: Side of a patch, in pixels. Up to 8 pixels the factors are 2, 1, 1/2 and 1/4,
            above 8 pixels 4, 2, 1 and 1/2.
    """
    return (2, 1, 0.5, 0.25) if patch_size <= 8 else (4, 2, 1, 0.5)


def neck_of(student: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    """Returns the neck of a student, and the numbers of channels of the neck's four maps.

    The neck turns the student's maps into four maps, of which the first is the finest.
    """
    if has_stages(student):
        return NormedStages(student.stage_widths), tuple(student.stage_widths)
    neck = RescaledMaps(student.width, scales_of(student.patch_size))
    return neck, (student.width,) * NUM_STAGES


def pyramid_of(student: nn.Module, width: int) -> nn.Module:
    """Returns the pyramid that fits a student.

    Args:
        student: A backbone with several stages, or a plain ViT.
        width: Number of channels of each of the pyramid's maps.
    """
    if has_stages(student):
        return FeaturePyramid(list(student.stage_widths), width)
    return SimplePyramid(student.width, width)


def strides_of(student: nn.Module) -> tuple[float, ...]:
    """Returns the strides of the pyramid's five maps in pixels, finest first."""
    finest = student.stage_strides[0] if has_stages(student) else student.patch_size / 4
    return tuple(float(finest * 2**level) for level in range(NUM_STAGES + 1))


def has_stages(student: nn.Module) -> bool:
    """Whether a student has a map for each of several stages, as a Swin has."""
    return hasattr(student, "stage_widths")

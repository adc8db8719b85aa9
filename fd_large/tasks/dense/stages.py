"""Prepares a distilled student for dense tasks: its maps of images of any size, and their neck.

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
# Parameters of a distilled student that `strip` removes, with the values that stand for them in an
# exported whole student, whose final norm then only normalises.
LEFT_OUT = {**FINAL_NORM, "cls_token": 0.0, "dist_token": 0.0, "reg_token": 0.0}


def strip(student: nn.Module, *, windowed: bool = True) -> None:
    """Removes the final norm and, before windows, the class tokens from a student.

    These parameters would get no gradient, but DeepSpeed would still apply weight decay to them.

    Args:
        student: A backbone with a map for each stage (`stage_widths`, `stage_strides`), each of
            half the previous resolution, or a backbone with a single map whose blocks can attend
            within windows (`attends_in_windows`).
        windowed: Whether a student with a single map will see windows, without its class tokens
            (`features`), or whole images of its own size, with them (`maps_of_blocks`).

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
    """Maps normalised images of any size to the pyramid's input.

    Args:
        student: The student, after `strip`.
        pixels: (B, 3, H, W), any float dtype.
        keep: (num_sites, B) bool, drop path's draws; None: every branch is kept.

    Returns: a map (B, H, W, C) of each stage, or the only map.
    """
    pixels = pixels.to(next(student.parameters()).dtype)
    if has_stages(student):
        return student.stages(pixels, keep)
    return windowed_map(student, pixels, keep)


def blocks_taken(depth: int) -> tuple[int, int, int, int]:
    """Returns the blocks of a plain ViT whose maps are rescaled, counted from 0.

    They end a third, a half, two thirds and all of the model; as published, blocks 3, 5, 7, 11 of
    12 and 7, 11, 15, 23 of 24.
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
    """Maps normalised images of a ViT's own size to the maps of some blocks.

    Every token sees all others, class tokens included.

    Args:
        vit: The ViT, after `strip`.
        pixels: (B, 3, H, W), any float dtype (`at_own_size`).
        keep: (num_sites, B) bool, drop path's draws; None: every branch is kept.
        blocks: Numbers of the blocks, rising, counted from 0.

    Returns: (B, H / p, W / p, C) for each, without a norm.
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
    """Maps normalised images to the last map of a whole student, after its final norm.

    Args:
        student: A whole backbone, without `strip`.
        pixels: (B, 3, H, W), any float dtype; padded to the student's size if it has one.
        keep: (num_sites, B) bool, drop path's draws; None: every branch is kept.

    Returns: (B, C, h, w) without class tokens.
    """
    last = student(at_own_size(student, pixels).to(next(student.parameters()).dtype), keep)
    tokens = last.tokens[:, last.num_prefix_tokens :]
    return tokens.unflatten(1, last.grid).permute(0, 3, 1, 2)


def to_pixels(student: nn.Module, logits: Tensor, pixels: Tensor) -> Tensor:
    """Resizes a head's result (B, K, h, w) bilinearly to (B, K, H, W) for pixels (B, 3, H, W).

    Where the student saw padding beside the pixels, that part of the result is cut off.
    """
    size = at_own_size(student, pixels).shape[-2:]
    if logits.shape[-2:] != size:
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    return logits[..., : pixels.shape[-2], : pixels.shape[-1]]


def at_own_size(student: nn.Module, pixels: Tensor) -> Tensor:
    """Pads pixels (B, 3, H, W) with zeros, right and bottom, to a student's fixed size.

    Without a fixed size, pixels stay unchanged.
    """
    if not is_of_one_size(student):
        return pixels
    rows, columns = (side * student.patch_size for side in student.image_grid)
    height, width = pixels.shape[-2:]
    return F.pad(pixels, (0, max(columns - width, 0), 0, max(rows - height, 0)))


def is_of_one_size(student: nn.Module) -> bool:
    """Returns whether a student maps whole images of a single size only, as a ViT does."""
    return not has_stages(student) and hasattr(student, "image_grid")


def scales_of(patch_size: int) -> tuple[float, ...]:
    """Returns the factors by which a plain ViT's four maps are rescaled, as published."""
    return (2, 1, 0.5, 0.25) if patch_size <= 8 else (4, 2, 1, 0.5)


def neck_of(student: nn.Module) -> tuple[nn.Module, tuple[int, ...]]:
    """Returns the neck that turns a student's maps into four, finest first, and their widths."""
    if has_stages(student):
        return NormedStages(student.stage_widths), tuple(student.stage_widths)
    neck = RescaledMaps(student.width, scales_of(student.patch_size))
    return neck, (student.width,) * NUM_STAGES


def pyramid_of(student: nn.Module, width: int) -> nn.Module:
    """Returns the pyramid that fits a student, with `width` channels on every level."""
    if has_stages(student):
        return FeaturePyramid(list(student.stage_widths), width)
    return SimplePyramid(student.width, width)


def strides_of(student: nn.Module) -> tuple[float, ...]:
    """Returns the pixels per place of each level of the pyramid, finest first."""
    finest = student.stage_strides[0] if has_stages(student) else student.patch_size / 4
    return tuple(float(finest * 2**level) for level in range(NUM_STAGES + 1))


def has_stages(student: nn.Module) -> bool:
    """Returns whether a student has a map for each of several stages."""
    return hasattr(student, "stage_widths")

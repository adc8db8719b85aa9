"""A distilled student as a pyramid: its maps on images of any size, and what they are put through.

Parameters and their names stay the student's, so that its weights load and go on as they are.
"""

from __future__ import annotations

from torch import Tensor, nn

from fd_large.errors import ConfigError
from fd_large.tasks.dense.pyramids import FeaturePyramid, SimplePyramid
from fd_large.tasks.dense.windowed_vit import check, windowed_map

NUM_STAGES = 4
# Parameters of a distilled student that `strip` takes out, with the values that a whole student has
# in their place: its final norm then only normalises.
LEFT_OUT = {"norm.weight": 1.0, "norm.bias": 0.0, "cls_token": 0.0, "dist_token": 0.0}


def strip(student: nn.Module) -> None:
    """Takes the final norm and the class tokens out of a student.

    They would get no gradient, and parameters without one are still decayed under DeepSpeed.

    Args:
        student: A backbone whose stages give a map each (`stage_widths`, `stage_strides`), of half
            the resolution of the one before, or one with a single map whose blocks can attend
            within windows (`attends_in_windows`).

    Raises: ConfigError: if no pyramid can stand on the student.
    """
    if _has_stages(student):
        stages, size_rule = len(student.stage_widths), getattr(student, "size_rule", "pad")
        if stages != NUM_STAGES or size_rule != "pad":
            raise ConfigError(
                f"student.model: the pyramid stands on {NUM_STAGES} stages of any size; got "
                f"{stages} stages, size_rule {size_rule!r}, expected {NUM_STAGES} and 'pad'. Set "
                "--student.model and --student.size_rule."
            )
        if hasattr(student, "check_stages"):
            student.check_stages()
    elif getattr(student, "attends_in_windows", False):
        check(student)
        student.cls_token = student.dist_token = None
    else:
        raise ConfigError(
            f"student.model: no pyramid stands on this model; got {type(student).__name__}, "
            "expected one that maps images of any size, such as swinv2_base. Set --student.model."
        )
    student.norm = None


def features(
    student: nn.Module, pixels: Tensor, keep: Tensor | None
) -> Tensor | tuple[Tensor, ...]:
    """Maps normalised images of any size to what the pyramid takes.

    Args:
        student: After `strip`.
        pixels: (B, 3, H, W), any float dtype.
        keep: (num_sites, B) bool, drop path's draws; None: every branch is kept.

    Returns: a map (B, H, W, C) of each stage, or the only map.
    """
    pixels = pixels.to(next(student.parameters()).dtype)
    if _has_stages(student):
        return student.stages(pixels, keep)
    return windowed_map(student, pixels, keep)


def pyramid_of(student: nn.Module, width: int) -> nn.Module:
    """Returns the pyramid that fits a student, with `width` channels on every level."""
    if _has_stages(student):
        return FeaturePyramid(list(student.stage_widths), width)
    return SimplePyramid(student.width, width)


def strides_of(student: nn.Module) -> tuple[float, ...]:
    """Returns the pixels per place of each level of the pyramid, finest first."""
    finest = student.stage_strides[0] if _has_stages(student) else student.patch_size / 4
    return tuple(float(finest * 2**level) for level in range(NUM_STAGES + 1))


def _has_stages(student: nn.Module) -> bool:
    return hasattr(student, "stage_widths")

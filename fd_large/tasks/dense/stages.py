"""A distilled student as a pyramid: its maps on images of any size, and what they are put through.

Parameters and their names stay the student's, so that its weights load and go on as they are.
"""

from __future__ import annotations

from torch import Tensor, nn

from fd_large.backbones.hierarchical import HierarchicalBackbone
from fd_large.backbones.vit.vit import ViT
from fd_large.errors import ConfigError
from fd_large.tasks.dense.pyramids import FeaturePyramid, SimplePyramid
from fd_large.tasks.dense.windowed_vit import check, windowed_map

NUM_STAGES = 4
# Parameters of a distilled student that `strip` takes out, with the values that a whole student has
# in their place: its final norm then only normalises.
LEFT_OUT = {"norm.weight": 1.0, "norm.bias": 0.0, "cls_token": 0.0, "dist_token": 0.0}

SwinOrViT = HierarchicalBackbone | ViT


def strip(student: SwinOrViT) -> None:
    """Takes the final norm and the class tokens out of a student.

    They would get no gradient, and parameters without one are still decayed under DeepSpeed.

    Raises: ConfigError: if no pyramid can stand on the student.
    """
    if isinstance(student, ViT):
        check(student)
        student.cls_token = student.dist_token = None
    elif len(student.depths) != NUM_STAGES or student.size_rule != "pad":
        raise ConfigError(
            f"student: the pyramid stands on {NUM_STAGES} stages of any size; got "
            f"{len(student.depths)} stages, size_rule {student.size_rule!r}, expected "
            f"{NUM_STAGES} and 'pad'. Set --student.model and --student.size_rule."
        )
    student.norm = None


def features(
    student: SwinOrViT, pixels: Tensor, keep: Tensor | None
) -> Tensor | tuple[Tensor, ...]:
    """Maps normalised images of any size to what the pyramid takes.

    Args:
        student: After `strip`.
        pixels: (B, 3, H, W), any float dtype.
        keep: (num_sites, B) bool, drop path's draws; None: every branch is kept.

    Returns: of a ViT one map (B, H, W, C), of a Swin model a map of each stage.
    """
    if isinstance(student, ViT):
        return windowed_map(student, pixels, keep)
    return student.stages(pixels, keep)


def pyramid_of(student: SwinOrViT, width: int) -> nn.Module:
    """Returns the pyramid that fits a student, with `width` channels on every level."""
    if isinstance(student, ViT):
        return SimplePyramid(student.width, width)
    return FeaturePyramid([student.embed_dim * 2**stage for stage in range(NUM_STAGES)], width)


def strides_of(student: SwinOrViT) -> tuple[float, ...]:
    """Returns the pixels per place of each level of the pyramid, finest first."""
    finest = student.patch_size / 4 if isinstance(student, ViT) else student.patch_size
    return tuple(float(finest * 2**level) for level in range(NUM_STAGES + 1))

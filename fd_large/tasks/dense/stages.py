"""From a distilled student to five maps of one width: the part of a detector below its heads."""

from __future__ import annotations

from torch import Tensor, nn

from fd_large.backbones.hierarchical import HierarchicalBackbone
from fd_large.backbones.vit.vit import ViT
from fd_large.errors import ConfigError
from fd_large.tasks.dense.fpn import FeaturePyramid
from fd_large.tasks.dense.simple_pyramid import SimplePyramid
from fd_large.tasks.dense.windowed_vit import check, windowed_map

NUM_STAGES = 4

SwinOrViT = HierarchicalBackbone | ViT


def strip(student: SwinOrViT) -> None:
    """Takes from a model what detection has no use for; the weights of the rest keep their names.

    A parameter without a gradient would still be decayed under DeepSpeed.

    Raises: ConfigError: if the model can carry no pyramid.
    """
    if isinstance(student, ViT):
        check(student)
        student.cls_token = student.dist_token = None
    elif len(student.depths) != NUM_STAGES or student.size_rule != "pad":
        raise ConfigError(
            f"detection: the pyramid stands on {NUM_STAGES} stages of any size; got "
            f"{len(student.depths)} stages, size_rule {student.size_rule!r}, expected "
            f"{NUM_STAGES} and 'pad'. Set --student.architecture.depths."
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
    return student(pixels, keep, every_stage=True)


def pyramid_of(student: SwinOrViT, width: int) -> nn.Module:
    """Returns the pyramid that fits a model, of so many channels."""
    if isinstance(student, ViT):
        return SimplePyramid(student.width, width)
    return FeaturePyramid([student.embed_dim * 2**stage for stage in range(NUM_STAGES)], width)


def strides_of(student: SwinOrViT) -> tuple[float, ...]:
    """Returns the pixels per place of each level of the pyramid, finest first."""
    finest = student.patch_size / 4 if isinstance(student, ViT) else student.patch_size
    return tuple(float(finest * 2**level) for level in range(NUM_STAGES + 1))

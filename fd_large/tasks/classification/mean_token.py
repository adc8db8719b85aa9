"""The feature of an image that a classifier is given: the mean of its patch tokens, normalised.

A ViT classifies the mean of its patch tokens, normalised by a norm of its own; its final norm is
discarded. A Swin model keeps its norm. The map of a model of timm may be raw: its mean is
normalised too, and what norms it has stay.

Source: the official code (models/vision_transformer.py, models/swin_transformer_v2.py) of
SwinTransformer/Feature-Distillation.
"""

from __future__ import annotations

from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.layers import LayerNorm
from fd_large.recipes.family import FamilyArchitecture

NORM_EPS = 1e-6
# A ViT's final norm, which these tasks discard, and the values that a whole model has in its place.
DISCARDED = {"norm.weight": 1.0, "norm.bias": 0.0}


def has_norm_instead(model: nn.Module) -> bool:
    """Returns whether a norm of the mean token takes the place of a model's final norm."""
    return _kind(model) == "instead"


def norm_of_mean(model: nn.Module) -> LayerNorm | None:
    """Makes the norm of a model's mean token; takes a ViT's final norm away.

    Args:
        model: A backbone of `fd_large.backbones`.

    Returns: a norm that begins as the identity of normalised numbers; None for a model that keeps
        its own.
    """
    if has_norm_instead(model):
        norm = LayerNorm(model.width, model.norm.eps)
        model.norm = nn.Identity()
        return norm
    return LayerNorm(model.width, NORM_EPS) if _kind(model) == "also" else None


def mean_token(features: FeatureMap, norm: LayerNorm | None) -> Tensor:
    """Returns (B, C) float32.

    Args:
        features: The map of a model that `norm_of_mean` has prepared.
        norm: What it made.
    """
    mean = features.tokens[:, features.num_prefix_tokens :].float().mean(1)
    return mean if norm is None else norm(mean)


def _kind(model: nn.Module) -> str:
    return getattr(model, "mean_norm", FamilyArchitecture.mean_norm)

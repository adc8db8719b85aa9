"""Exports a timm student as the same timm model without its head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fd_large.backbones.exports import timm_weights
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.timm.architecture import TimmArchitecture, split_arguments
from fd_large.backbones.timm.models import config_of, create, size_arguments, strides
from fd_large.backbones.timm.timm_backbone import TimmBackbone

OURS = "net."


def lacks(architecture: TimmArchitecture, pads: bool = False) -> str:
    """Returns "" if the model ends with timm's last map, else in words the map at which it ends.

    timm has no model that ends before its last map.

    Args:
        architecture: The model.
        pads: Not used.
    """
    del pads
    last = strides(architecture.timm_name)[-1]
    if architecture.feature_stride in (0, last):
        return ""
    return (
        f"the map at stride {architecture.feature_stride}, but timm's model ends at stride {last}"
    )


def added(architecture: TimmArchitecture) -> dict[str, Tensor]:
    """Returns {timm's name: tensor} of tensors that timm's model has and ours lacks.

    The tensors have timm's initial values. Examples are the head's norm, which follows the map, and
    counters of batch norms.
    """
    name = architecture.timm_name
    arguments = {**size_arguments(name, architecture.image_size), "num_classes": 0}
    with torch.device("meta"):
        ours = TimmBackbone(name, image_size=architecture.image_size).state_dict()
    with torch.random.fork_rng(devices=[]):
        theirs = create(name, **arguments).state_dict()
    floats = {key for key, tensor in ours.items() if tensor.is_floating_point()}
    return {key: tensor for key, tensor in theirs.items() if f"{OURS}{key}" not in floats}


def config(architecture: TimmArchitecture, statistics: Statistics) -> dict[str, Any]:
    """Returns the contents of timm's config.json for a model.

    Args:
        architecture: The model.
        statistics: Mean and standard deviation by which the model's images are normalised.
    """
    name = architecture.timm_name
    known = config_of(name)
    timm_name, arguments = split_arguments(name)
    arguments |= size_arguments(name, architecture.image_size)
    size = architecture.image_size or known.input_size[-1]
    return {
        "architecture": timm_name,
        "num_classes": 0,
        "model_args": arguments,
        "pretrained_cfg": timm_weights(
            size,
            statistics,
            fixed_input_size=bool(known.fixed_input_size),
            first_conv=known.first_conv,
            classifier=known.classifier,
        ),
    }


def class_name(architecture: TimmArchitecture) -> str:
    """Returns the name of the class of `architecture` in timm, such as "VisionTransformer"."""
    with torch.device("meta"):
        return type(create(architecture.timm_name)).__name__

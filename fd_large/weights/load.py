"""Loads an exported model into CPU memory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from fd_large import doors
from fd_large.backbones.hierarchical import SizeRule
from fd_large.backbones.registry import build
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.windows import WindowRule
from fd_large.errors import WeightsError
from fd_large.weights.resolve import Sources


def load_model(
    folder: str | Path,
    *,
    allow_code: Iterable[str | os.PathLike[str]] = (),
    size_rule: SizeRule = "drop",
    window_rule: WindowRule = "masked",
    shift_stages: tuple[bool, ...] = (),
    stage_windows: tuple[int, ...] = (),
) -> tuple[nn.Module, Statistics]:
    """Builds the model of an export with its weights, ready for inference.

    Args:
        folder: Folder from `export --to fd`, `timm` or `hf`, or from `weights convert --to fd`.
        allow_code: Python files or `module:` names of the user's code that may be run to make the
            model.
        size_rule: "pad" lets Swin models pad images whose size does not fit; "drop" pads no image.
        window_rule: As in the `student` section of the model's recipe.
        shift_stages: As in that section.
        stage_windows: As in that section.

    Returns: the backbone, which maps normalised images (B, 3, H, W) to a `FeatureMap`, and the
        statistics by which images are normalised.
    Raises: WeightsError: if the folder is not an export, or its weights do not fit the model.
    """
    where = "load_model"
    for code in allow_code:
        doors.allow(code)
    weights = Sources().resolve(folder, where=where)
    stored = weights.stored
    if stored is None:
        raise WeightsError(
            f"{where}: {folder}: not an export of this project; got no config.json that describes "
            "an export, expected a folder of export or of weights convert --to fd. Name such a "
            "folder."
        )
    net = build(
        stored.architecture,
        initialization="none",
        size_rule=size_rule,
        window_rule=window_rule,
        shift_stages=shift_stages,
        stage_windows=stage_windows,
    )
    fill(net, weights.fitted(stored.architecture))
    return net.requires_grad_(False).eval(), stored.statistics


def fill(net: nn.Module, items: Iterable[tuple[str, Tensor]]) -> None:
    """Copies (name, tensor) pairs into the parameters and buffers of a whole module in CPU memory.

    A tensor whose name the module lacks is ignored.
    """
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    with torch.no_grad():
        for name, tensor in items:
            if name in tensors:
                tensors[name].copy_(tensor)

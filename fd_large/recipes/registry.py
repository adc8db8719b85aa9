"""The runs of record by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from fd_large.errors import ConfigError, nearest
from fd_large.recipes import (
    depth,
    detection,
    distillation,
    distillation_swinv2,
    finetuning,
    linear,
    segmentation,
    several_teachers,
)
from fd_large.recipes.quickstart import quickstart
from fd_large.recipes.run import Run

RECIPES: dict[str, Callable[[], Run]] = {
    recipe.__name__: recipe
    for recipe in (
        quickstart,
        distillation.fd_clip_vit_base,
        distillation.fd_clip_vit_base_100ep,
        distillation.fd_clip_vit_large,
        distillation.fd_dino_vit_base,
        distillation.fd_deit_vit_base,
        distillation.fd_esvit_swin_base,
        distillation_swinv2.fd_swinv2_base,
        distillation_swinv2.fd_swinv2_large,
        distillation_swinv2.fd_swinv2_1b,
        distillation_swinv2.fd_swinv2h,
        distillation_swinv2.fd_swinv2g,
        several_teachers.unic_vit_base,
        several_teachers.theia_vit_base,
        several_teachers.sak_vit_base,
        several_teachers.agglomerative_vit_large,
        several_teachers.agglomerative_swinv2_giant,
        several_teachers.proxy_vit_giant,
        several_teachers.proxy_vit_base,
        finetuning.finetune_clip_vit_base,
        finetuning.finetune_clip_vit_base_100ep,
        finetuning.finetune_clip_vit_large,
        finetuning.finetune_dino_vit_base,
        finetuning.finetune_deit_vit_base,
        finetuning.finetune_esvit_swin_base,
        finetuning.finetune_clip_vit_large_22k,
        finetuning.finetune_clip_vit_large_22k_1k,
        finetuning.finetune_clip_vit_large_22k_1k_336,
        finetuning.finetune_swinv2_base,
        finetuning.finetune_swinv2_large,
        finetuning.finetune_swinv2_giant,
        finetuning.finetune_clip_vit_base_plain,
        finetuning.finetune_clip_vit_large_plain,
        linear.linear_probe,
        detection.coco_mask_rcnn_vit_base,
        detection.coco_mask_rcnn_swinv2_tiny,
        detection.coco_mask_rcnn_swinv2_base,
        detection.coco_mask_rcnn_swinv2_giant,
        detection.coco_cascade_vit_base,
        detection.coco_cascade_vit_large,
        detection.coco_cascade_swinv2_base,
        detection.coco_cascade_swinv2_large,
        detection.o365_cascade_swinv2_giant,
        detection.coco_htc_swinv2_giant,
        segmentation.ade20k_upernet_vit_base,
        segmentation.ade20k_upernet_vit_large,
        segmentation.ade20k_upernet_swinv2_base,
        segmentation.ade20k_upernet_swinv2_giant,
        segmentation.ade20k_linear,
        depth.nyuv2_vit_base,
        depth.nyuv2_swinv2_base,
        depth.nyuv2_swinv2_large,
        depth.nyuv2_swinv2_giant,
        depth.nyuv2_linear,
    )
}

DEFAULT_RECIPE = "quickstart"
# What a command that carries models on takes its defaults from.
FINETUNING_RECIPE = "finetune_clip_vit_base"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts of a recipe, one line each, as the table of recipes shows them.

    Duration and memory of a GPU are what `plan` computes for the recipe's own settings on A100s (of
    40 GB where the hardware says so) in nodes of 8 with eight 100 Gb/s network cards, with the
    DeepSpeed JSON that the docstring names, or zero1.json.
    """

    summary: str
    hardware: str
    duration: str
    memory: str
    result: str


def get(name: str, *, where: str = "--recipe") -> Run:
    """Returns the recipe of that name.

    Args:
        name: The name.
        where: What gave it, for messages.

    Raises:
        ConfigError: No recipe has that name; the message gives the nearest ones.
    """
    if name not in RECIPES:
        close = nearest(name, RECIPES)
        raise ConfigError(f"{where}: no such recipe; got {name!r}, {close}")
    return RECIPES[name]()


def facts(name: str) -> Facts:
    """Returns the first line of a docstring and those that begin with a fact's name."""
    lines = (inspect.getdoc(RECIPES[name]) or "").splitlines()

    def first(key: str) -> str:
        found = (line.removeprefix(key).strip() for line in lines if line.startswith(key))
        return next(found, "")

    return Facts(
        summary=lines[0],
        hardware=first("Hardware:"),
        duration=first("Duration:"),
        memory=first("Memory:"),
        result=first("Result:"),
    )

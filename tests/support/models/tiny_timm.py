"""Tiny models of timm's kinds, registered with timm: what is shown of them takes no real size."""

from __future__ import annotations

from typing import Any

import timm
from timm.models import mlp_mixer, register_model

FOUR_STAGES = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
SMALLER = {
    "swin_tiny_patch4_window7_224": FOUR_STAGES,
    "swinv2_tiny_window8_256": FOUR_STAGES,
    "swinv2_cr_tiny_224": FOUR_STAGES,
    "eva02_tiny_patch14_224": {"embed_dim": 48, "depth": 4},
    "beit_base_patch16_224": {"embed_dim": 48, "depth": 4, "num_heads": 3},
    "convnextv2_atto": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)},
}
"""What a model of timm is given to be tiny; its images keep their size."""


def _register(name: str) -> None:
    def make(pretrained: bool = False, **arguments: Any) -> Any:
        return timm.create_model(name, pretrained=pretrained, **SMALLER[name] | arguments)

    make.__name__ = tiny(name)
    register_model(make)


def tiny(name: str) -> str:
    """The name of the tiny model of the kind of another one."""
    return f"small_{name}"


for _name in SMALLER:
    _register(_name)


@register_model
def small_mixer_s32_224(pretrained: bool = False, **arguments: Any) -> Any:
    options = {"patch_size": 32, "num_blocks": 4, "embed_dim": 32} | arguments
    return mlp_mixer._create_mixer("mixer_s32_224", pretrained=pretrained, **options)

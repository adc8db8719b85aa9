"""What timm knows of its models beside their tensors: heads, windows, activation, statistics."""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from fd_large.backbones.statistics import Statistics
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture

_ACTIVATIONS = {"GELU": "gelu", "QuickGELU": "quick_gelu"}


def of_net(net: nn.Module, *, where: str = "weights") -> Architecture:
    """Returns the fields of a ViT, BEiT, Swin or SwinV2 of timm that no name or shape tells.

    Nothing of other models.

    Raises: WeightsError: for an activation that no model here has.
    """
    if isinstance(net, VisionTransformer | Beit):
        block = net.blocks[0]
        return Architecture(
            num_heads=(block.attn.num_heads,),
            activation=_activation(block.mlp.act, where),
            norm_eps=block.norm1.eps,
            image_size=net.patch_embed.img_size[0],
        )
    if not isinstance(net, SwinTransformer | SwinTransformerV2):
        return Architecture()
    blocks = [stage.blocks[0] for stage in net.layers]
    windows = [block.window_size[0] for block in blocks]
    own: dict[str, Any] = {
        "window_size": max(windows),
        "image_size": net.patch_embed.img_size[0],
        "norm_eps": blocks[0].norm1.eps,
    }
    given = [getattr(block.attn, "pretrained_window_size", None) for block in blocks]
    if all(given):  # SwinV2; 0 is the window itself.
        pairs = zip(given, windows, strict=True)
        own["pretrained_window_sizes"] = tuple(size[0] or window for size, window in pairs)
    return Architecture(**own)


def of_config(config: dict[str, Any], *, where: str = "weights") -> Architecture:
    """The same from a `config.json` of timm, whose model is built without memory."""
    name = config["architecture"]
    if not timm.is_model(name):
        return Architecture()
    with torch.device("meta"):
        return of_net(timm.create_model(name, **config.get("model_args", {})), where=where)


def statistics_of(name: str) -> Statistics:
    """Mean and deviation that timm's weights of a model were trained with."""
    config = timm.get_pretrained_cfg(name)
    return Statistics(tuple(config.mean), tuple(config.std))


def _activation(module: nn.Module, where: str) -> str:
    name = type(module).__name__
    if name not in _ACTIVATIONS or getattr(module, "approximate", "none") != "none":
        raise WeightsError(
            f"{where}: an activation that no model here has; got timm's {name}, expected one of "
            f"{', '.join(_ACTIVATIONS)}. As a teacher, name it timm:NAME."
        )
    return _ACTIVATIONS[name]

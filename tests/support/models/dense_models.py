"""Small backbones for tests of dense tasks, and their parts computed by hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny_timm import tiny
from torch import Tensor, nn

from fd_large.backbones.registry import build
from fd_large.recipes.architectures import Architecture
from fd_large.tasks.dense.stages import strip


def lively(net: nn.Module) -> nn.Module:
    """Fills norms that end a branch and tables, which start near zero and would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.3)
            if "cpb_mlp" in name:
                parameter.mul_(20)
            if "bias_table" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return net


def swin_of(model: str, rules: dict[str, object] | None = None, **shape: object) -> nn.Module:
    """A stripped Swin or SwinV2 of one head a stage, with rules of windows."""
    torch.manual_seed(0)
    heads = {"num_heads": (1, 1, 1, 1), "embed_dim": 4, "mlp_ratio": 1.0}
    # As the giant's recipe has it: attention of the first two stages for few windows at a time.
    options = {"size_rule": "pad", "sequential_stages": 2, **(rules or {})}
    net = build(model, Architecture(**(heads | shape)), **options)
    strip(net)
    return lively(net).eval()


def timm_of() -> nn.Module:
    """A stripped ConvNeXt of timm."""
    torch.manual_seed(0)
    net = build(f"timm:{tiny('convnextv2_atto')}", is_trained=True)
    strip(net)
    return lively(net).eval()


def vit_of(**shape: object) -> nn.Module:
    """A stripped ViT with the positions of 64 pixels."""
    torch.manual_seed(0)
    options = {"embed_dim": 8, "depths": (4,), "num_heads": (2,), "image_size": 64} | shape
    net = build(options.pop("model", "vit_base_patch16"), Architecture(**options))
    strip(net)
    return lively(net).eval()


def padded(x: Tensor, multiple: int) -> Tensor:
    """Zeros right and bottom of a map (H, W, C)."""
    height, width, channels = x.shape
    rows, columns = -(-height // multiple) * multiple, -(-width // multiple) * multiple
    whole = torch.zeros(rows, columns, channels)
    whole[:height, :width] = x
    return whole


def norm(module: nn.Module, x: Tensor) -> Tensor:
    """What a LayerNorm makes of x."""
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


def mlp(module: nn.Module, x: Tensor) -> Tensor:
    """What a block's MLP makes of x."""
    hidden = F.gelu(F.linear(x, module.fc1.weight, module.fc1.bias))
    return F.linear(hidden, module.fc2.weight, module.fc2.bias)

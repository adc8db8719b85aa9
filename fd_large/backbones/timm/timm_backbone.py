"""Any backbone of timm as a frozen teacher: the map at a chosen stride, in the common form.

The map is what the last stage of that stride returns. If that is the model's last stage, the final
norm has been applied to every token, as timm's `forward_features` does; the maps of earlier stages
are raw activations. What the model computes after the map is not built.

Source: Wightman, PyTorch Image Models, https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import timm
import torch.nn.functional as F
from einops import rearrange
from timm.models.hiera import Hiera
from timm.models.hieradet_sam2 import HieraDet
from torch import Tensor, nn

from fd_large.backbones.family import Options
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.timm.architecture import TimmArchitecture
from fd_large.errors import ConfigError, ShapeError, nearest


class TimmBackbone(nn.Module):
    """A model of timm up to the last stage of a stride; for inference only.

    Parameters and buffers have timm's names, after `net.`. Under `zero.Init` it cannot be built:
    timm's constructors write to their children's parameters, which are in pieces by then. It is
    built whole and split afterwards.

    Args:
        name: timm's name of the model.
        stride: Pixels per token of the map.

    Attributes:
        width: Channels of the map.
        stride: Pixels per token.
        num_prefix_tokens: 0; class tokens are left out of the map.
        drop_path_rates: None.

    Raises: ConfigError: if timm has no such model, or the model no map of that stride.
    """

    num_prefix_tokens = 0
    drop_path_rates: tuple[float, ...] = ()

    def __init__(self, name: str, *, stride: int):
        super().__init__()
        self.name, self.stride = name, stride
        net = create(name)
        index, self.width = _last_stage(net, name, stride)
        # Hiera's norms are its heads': its map is raw, and timm refuses to be asked.
        ends = index == len(net.feature_info) - 1 and not isinstance(net, Hiera | HieraDet)
        net.prune_intermediate_layers([index], prune_norm=not ends, prune_head=True)
        config = net.pretrained_cfg
        self.fixed_size = config["input_size"][1:] if config.get("fixed_input_size") else None
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.forward = partial(_batch_norm, module)
        # timm reaches inner maps by a method; the hooks of ZeRO-3 want the model itself called, or
        # parameters that it owns directly (class token, positions) would not be gathered.
        net.forward = partial(
            net.forward_intermediates,
            indices=[index],
            norm=ends,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        self.net = net

    def blocks(self) -> list[nn.Module]:
        """Returns no blocks: nothing of a teacher is checkpointed."""
        return []

    def no_weight_decay(self) -> frozenset[str]:
        """Returns no names: a teacher is not trained."""
        return frozenset()

    def no_weight_decay_keywords(self) -> tuple[str, ...]:
        """Returns no keywords."""
        return ()

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns (rows, columns) of the map of an image of (height, width) pixels.

        Raises: ShapeError: if the size is no multiple of the stride (models of timm round in
            different ways), or not the one size that the model takes.
        """
        if height % self.stride or width % self.stride:
            raise ShapeError(
                f"{self.name}: the image does not divide into tokens; got {height}x{width} pixels, "
                f"expected multiples of the stride {self.stride}. Set --data.image_size, or of a "
                "teacher --objective.teacher_image_size."
            )
        if self.fixed_size and (height, width) != tuple(self.fixed_size):
            rows, columns = self.fixed_size
            raise ShapeError(
                f"{self.name}: a model of one image size; got {height}x{width} pixels, expected "
                f"{rows}x{columns}. Set --data.image_size {rows}, or of a teacher "
                f"--objective.teacher_image_size {rows}."
            )
        return height // self.stride, width // self.stride

    def forward(self, images: Tensor, keep: Tensor | None = None) -> FeatureMap:
        """Maps normalised images to tokens.

        Args:
            images: (B, 3, H, W), any float dtype.
            keep: None: there is no drop path.

        Returns: tokens (B, N, C) in the dtype of the weights, no prefix tokens.
        Raises: ShapeError: if the image size does not fit.
        """
        assert keep is None, "a timm backbone has no drop path"
        grid = self.grid(*images.shape[-2:])
        (features,) = self.net(images)  # (B, C, h, w)
        assert features.shape[-2:] == grid, f"{self.name}: grid {tuple(features.shape[-2:])}"
        return FeatureMap(rearrange(features, "b c h w -> b (h w) c"), grid, 0)


def create(name: str) -> nn.Module:
    """Builds a model of timm by name, whole, without asking any server.

    Raises: ConfigError: if timm has no such model, or does not return its inner maps.
    """
    if not timm.is_model(name):
        raise ConfigError(
            f"architecture.timm_name: timm {timm.__version__} has no such model; got {name!r}, "
            f"{nearest(name, timm.list_models())}. Use a name of timm.list_models()."
        )
    net = timm.create_model(name, pretrained=False)
    if not hasattr(net, "forward_intermediates") or not hasattr(net, "prune_intermediate_layers"):
        raise ConfigError(
            f"architecture.timm_name: timm {timm.__version__} does not return inner maps of this "
            f"model; got {name!r}, expected one with forward_intermediates. Choose another model."
        )
    return net


def _last_stage(net: Any, name: str, stride: int) -> tuple[int, int]:
    """Index among the model's stages, and channels, of the deepest map of a stride."""
    stages = [(stage["reduction"], stage["num_chs"]) for stage in net.feature_info]
    fitting = [i for i, (reduction, _) in enumerate(stages) if reduction == stride]
    if not fitting:
        known = sorted({reduction for reduction, _ in stages})
        raise ConfigError(
            f"architecture.feature_stride: {name} has no map of this stride; got {stride}, "
            f"expected one of {', '.join(map(str, known))}. Choose one of these."
        )
    return fitting[-1], stages[fitting[-1]][1]


def _batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Batch normalisation by running statistics, in float32 whatever the dtype of the weights.

    The statistics are buffers and stay float32 when parameters become bfloat16; torch refuses the
    mixture, and bfloat16 variances would be wrong by up to 0.4%.

    Args:
        norm: A BatchNorm of torch or of timm, whose class adds dropout and an activation.
        x: (B, C, ...).

    Returns: of the shape and dtype of x.
    """
    y = F.batch_norm(
        x.float(),
        norm.running_mean.float(),
        norm.running_var.float(),
        None if norm.weight is None else norm.weight.float(),
        None if norm.bias is None else norm.bias.float(),
        training=False,
        eps=norm.eps,
    ).to(x.dtype)
    for name in ("drop", "act"):
        after = getattr(norm, name, None)
        y = y if after is None else after(y)
    return y


def build(architecture: TimmArchitecture, options: Options) -> TimmBackbone:
    """Builds a model with fresh weights, timm's own draws."""
    return TimmBackbone(architecture.timm_name, stride=architecture.feature_stride)

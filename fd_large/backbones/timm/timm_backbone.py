"""A timm model, as a student or a frozen teacher, that returns its map at a stride.

The model's last map is the result of timm's `forward_features`, without class tokens; the maps of
earlier stages are raw activations. Modules after the map are not built.

Source: Wightman, PyTorch Image Models, https://github.com/huggingface/pytorch-image-models.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fd_large.backbones import batch_norm
from fd_large.backbones.drop_path import branch_scales
from fd_large.backbones.family import Options
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.timm.architecture import TimmArchitecture
from fd_large.backbones.timm.drop_path import Kept, Scales, give_scales
from fd_large.backbones.timm.measure import Measured, measure, still
from fd_large.backbones.timm.models import (
    Stage,
    class_token_and_map_of,
    create,
    cut,
    inner_maps,
    last_map,
    map_of,
    sized,
    unused_by_stages,
)
from fd_large.backbones.token_positions import TokenPositions, image_positions, window_positions
from fd_large.errors import ConfigError, ShapeError

# Pixels per token of the first stage that a pyramid takes.
FINEST_STAGE = 4


class TimmBackbone(nn.Module):
    """A timm model up to its deepest map of a stride.

    Parameters and buffers have timm's names after the prefix `net.`. The model cannot be built
    under `zero.Init`, because timm's constructors write to their children's parameters, which
    `zero.Init` has already partitioned; the model is built whole and partitioned afterwards. The
    model's batch norms normalise by groups (`batch_norm.py`).

    Args:
        name: timm's name of the model.
        stride: Pixels per token of the map; 0 means the model's last map.
        image_size: Side in pixels of the images for which positions and windows are made; 0 means
            the model's default size in timm. Models without positions and windows take any size.
        drop_path_rate: Drop rate of the last block; timm's rule gives the rates of other blocks.
        is_trained: Whether the model is a student; a frozen model has neither blocks nor layers.

    Attributes:
        width: Channels of the map.
        stride: Pixels per token.
        num_prefix_tokens: 0, since class tokens are left out of the map.
        gives_summary: Whether the model returns its class token as `summary` of the feature map; a
            frozen model with a class token does.
        stage_strides: Pixels per token of each map of `stages`, finest first.
        stage_widths: Channels of each map of `stages`.
        drop_path_rates: Drop rate of each call of a drop path in a forward, in order.
        fewest_places: Number of positions of the smallest map that a batch norm normalises, for a
            student; 0 for a frozen model.

    Raises:
        ConfigError: If timm lacks the model, the model lacks a map of that stride, or a student's
            model cannot be trained.
    """

    num_prefix_tokens = 0

    def __init__(
        self,
        name: str,
        *,
        stride: int = 0,
        image_size: int = 0,
        drop_path_rate: float = 0.0,
        is_trained: bool = False,
    ):
        super().__init__()
        self.name, self._given_stride = name, stride
        self._measured: Measured | None = None
        size = sized(name, image_size)
        arguments = size.arguments
        if is_trained:
            self._measured = measure(name, stride, image_size, drop_path_rate)
            arguments = self._measured.arguments
        net = create(name, **arguments)
        self._exempt = tuple(getattr(net, "no_weight_decay", tuple)())
        self._stage = stage = cut(net, name, stride, image_size)
        self.width, self.stride = stage.width, stage.stride
        # Some have register tokens alone before those of the map.
        has_class_token = getattr(net, "cls_token", None) is not None
        has_prefix = stage.last is not None and stage.last.layout.num_prefix_tokens > 0
        self.gives_summary = has_class_token and has_prefix and not is_trained
        is_only = size.is_only or (stage.last is not None and not stage.last.layout.is_regular)
        self.fixed_size = size.side if is_only else 0
        still(net)
        self._groups = batch_norm.adopt(net)
        self.fewest_places = self._measured.fewest_places if self._measured else 0
        # timm reaches inner maps by a method; the hooks of ZeRO-3 want the model itself called, or
        # parameters that it owns directly (class token, positions) would not be gathered.
        net.forward = partial(_maps, net, stage, self.gives_summary)
        self.net = net
        # The deepest map of each stride, as far as the model is built.
        deepest = {info["reduction"]: i for i, info in enumerate(net.feature_info)}
        strides = sorted(s for s in deepest if FINEST_STAGE <= s <= self.stride)
        self.stage_strides, self._stages = tuple(strides), [deepest[s] for s in strides]
        self.stage_widths = tuple(net.feature_info[i]["num_chs"] for i in self._stages)
        self._scales = Scales()
        self.drop_path_rates = self._keep_rows() if self._measured else ()

    def _keep_rows(self) -> tuple[float, ...]:
        """Replaces each drop path by a `Kept` module, which takes its factors from rows of `keep`.

        Returns: the drop rate of each row of `keep`, the argument of `forward`.
        """
        assert self._measured is not None
        rows, owned = defaultdict(list), defaultdict(list)
        for row, (path, _) in enumerate(self._measured.sites):
            rows[path].append(row)
        for path, module in list(self.net.named_modules()):
            if isinstance(module, DropPath):
                drop_path = Kept(
                    self._scales, rows.get(path, ()), scales_by_keep=module.scale_by_keep
                )
                self.net.set_submodule(path, drop_path)
                if path in rows:  # Some models never call one of theirs.
                    owned[self._measured.owners[path]].append(drop_path)
        for path, sites in owned.items():
            give_scales(self.net.get_submodule(path), self._scales, sites)
        return tuple(rate for _, rate in self._measured.sites)

    def blocks(self) -> list[nn.Module]:
        """Returns the blocks whose activations can be recomputed; a frozen model has none."""
        if self._measured is None:
            return []
        return [self.net.get_submodule(path) for path in self._measured.blocks]

    def token_positions(self, grid: tuple[int, int]) -> Callable[[str, int], TokenPositions | None]:
        """Returns a function that finds the positions of an attention module's tokens.

        Diagnosis uses this function to place attention maps in the image.

        Args:
            grid: Rows and columns of the map.

        Returns: a function (name of the module, its number of tokens) -> positions of the tokens,
            or None if the positions are not known.
        """
        modules = dict(self.named_modules())
        num_prefix_tokens = getattr(self.net, "num_prefix_tokens", 0)

        @lru_cache
        def positions(name: str, num_tokens: int) -> TokenPositions | None:
            block = modules[name.rpartition(".")[0]]
            if isinstance(block, SwinTransformerBlock | SwinTransformerV2Block):
                window, shift = (tuple(size) for size in (block.window_size, block.shift_size))
                return window_positions(
                    tuple(block.input_resolution), window, shift, pad_first=False
                )
            if num_tokens == num_prefix_tokens + grid[0] * grid[1]:
                return image_positions(grid, num_prefix_tokens)
            return None

        return positions

    @property
    def last_layer(self) -> int:
        """The number of the layer that the head of the whole model has or would have.

        It is 0 for a frozen model, and if timm does not define layers of the model.
        """
        return self._measured.last_layer if self._measured else 0

    def layer_id(self, name: str) -> int:
        """Returns the number of the layer of the parameter `name`, for layer-wise learning rates.

        Layers are those of timm's `param_groups_layer_decay`. timm counts the final norm to the
        last block, whereas this package's own families count it to the last layer.

        Raises: ConfigError: if timm does not define the model's layers.
        """
        layers = self._measured.layers if self._measured else {}
        if not layers:
            raise ConfigError(
                f"optim.layer_decay: timm does not define layers of {self.name}; got a value "
                "other than 1, expected 1. Set --optim.layer_decay 1."
            )
        return layers[name.removeprefix("net.")]

    def no_weight_decay(self) -> frozenset[str]:
        """Returns the names of parameters that timm exempts from weight decay."""
        return frozenset(
            f"net.{name}"
            for name, _ in self.net.named_parameters()
            if any(fnmatch(name, pattern) for pattern in self._exempt)
        )

    def no_weight_decay_keywords(self) -> tuple[str, ...]:
        """Returns an empty tuple, since `no_weight_decay` has all names."""
        return ()

    def cast_buffers(self, dtype: torch.dtype) -> None:
        """Casts the buffers that are combined with weights (masks, biases, tables) to `dtype`.

        Running statistics and rotary positions stay float32, since they are used in float32.
        """
        for module in self.net.modules():
            if hasattr(module, "attention_bias_cache"):
                module.attention_bias_cache = {}  # LeViT's modules cache biases made of weights.
            if isinstance(module, _BatchNorm) or "Rotary" in type(module).__name__:
                continue
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point():
                    setattr(module, name, buffer.to(dtype))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns (rows, columns) of the map of an image of (height, width) pixels.

        Raises:
            ShapeError: If the size is not a multiple of the stride, since timm's models round such
                sizes in different ways; or if the model rejects the size.
        """
        grid, last = self._grid(height, width), self._stage.last
        if last and height == width != last.side:
            # A few models of any size take some sizes only, which a run shows.
            last_map(self.name, height)
        return grid

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        if self.fixed_size and (height, width) != (self.fixed_size, self.fixed_size):
            side = self.fixed_size
            raise ShapeError(
                f"{self.name}: takes only one image size; got {height}x{width} pixels, expected "
                f"{side}x{side}. Set --data.image_size {side}, or for a teacher "
                f"--objective.teacher_image_size {side}."
            )
        grid = self._stage.grid(height, width)
        if grid is None:
            raise ShapeError(
                f"{self.name}: the image does not divide into tokens; got {height}x{width} pixels, "
                f"expected multiples of the stride {self.stride}. Set --data.image_size, or for a "
                "teacher --objective.teacher_image_size."
            )
        return grid

    def forward(self, images: Tensor, keep: Tensor | None = None) -> FeatureMap:
        """Maps normalised images to tokens.

        Args:
            images: (B, 3, H, W), any float dtype.
            keep: (num_branches, B) bool, True where drop path keeps a branch; None keeps all.

        Returns: tokens (B, N, C) in the dtype of the weights, without prefix tokens, and the
            summary if `gives_summary`.
        Raises: ShapeError: if the image size does not fit, or `keep` has the wrong shape.
        """
        grid = self._grid(*images.shape[-2:])
        self._scales.now = branch_scales(keep, self.drop_path_rates, images.shape[0], images.device)
        if self.training:
            self._groups.images = len(images)
        summary, tokens = None, self.net(images)
        if self.gives_summary:
            summary, tokens = tokens
        self._scales.now = None
        if tokens.shape[1] != grid[0] * grid[1]:
            raise ShapeError(
                f"{self.name}: the map does not match its stride; got {tokens.shape[1]} tokens of "
                f"{images.shape[-2]}x{images.shape[-1]} pixels, expected {grid[0]}x{grid[1]}. "
                "Choose another image size."
            )
        return FeatureMap(tokens, grid, 0, summary)

    def check_stages(self) -> None:
        """Checks that the model's stages can be used as a feature pyramid.

        The stages can be used if each stage's stride is twice the stride of the stage before, the
        model accepts images of any size, and the stages use all modules of the model.

        Raises: ConfigError: if the stages cannot be used; the message names the reason.
        """
        finest, *coarser = self.stage_strides
        if coarser != [finest * 2 ** (i + 1) for i in range(len(coarser))]:
            got = f"strides {' '.join(map(str, self.stage_strides))}"
        elif self.fixed_size:
            got = f"a model for images of {self.fixed_size} pixels"
        elif idle := unused_by_stages(self.name, self._given_stride, tuple(self._stages)):
            got = f"layers after the stages, which would not be trained ({idle[0]})"
        else:
            return
        raise ConfigError(
            f"student.model: the stages of {self.name} do not make a pyramid; got {got}, expected "
            "a convolutional model with stages, such as timm:convnextv2_atto. Choose another "
            "model."
        )

    def stages(self, images: Tensor, keep: Tensor | None = None) -> tuple[Tensor, ...]:
        """Maps normalised images to the raw map of each stage.

        Args:
            images: (B, 3, H, W) of any size. Images are padded with zeros at the right and bottom
                to multiples of the coarsest stride.
            keep: (num_branches, B) bool, True where drop path keeps a branch; None keeps all.

        Returns: a map (B, h, w, C) for each of `stage_strides`.
        """
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.stride, 0, -height % self.stride))
        self._scales.now = branch_scales(keep, self.drop_path_rates, images.shape[0], images.device)
        if self.training:
            self._groups.images = len(images)
        maps = self.net(images, stages=self._stages)
        self._scales.now = None
        return tuple(rearrange(x, "b c h w -> b h w c") for x in maps)


def _maps(
    net: nn.Module, stage: Stage, gives_summary: bool, images: Tensor, stages: Sequence[int] = ()
) -> Any:
    if stages:
        return inner_maps(net, stages, images)
    return (class_token_and_map_of if gives_summary else map_of)(net, stage, images)


def build(architecture: TimmArchitecture, options: Options) -> TimmBackbone:
    """Builds a model with random weights, as timm initialises them."""
    return TimmBackbone(
        architecture.timm_name,
        stride=architecture.feature_stride,
        image_size=architecture.image_size,
        drop_path_rate=options.drop_path_rate,
        is_trained=options.is_trained,
    )

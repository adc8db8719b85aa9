"""The common base of Swin and SwinV2: patch embedding, stages with patch merging, final norm."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fd_large.backbones.drop_path import branch_scales, linear_rates
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.initialization import Scheme, fill
from fd_large.backbones.layers import LayerNorm, PatchEmbed, residual_dtype
from fd_large.backbones.windows import StageWindows, WindowRule
from fd_large.errors import ConfigError, ShapeError
from fd_large.recipes.family import WindowedTransformer

SizeRule = Literal["drop", "pad"]


class HierarchicalBackbone(nn.Module):
    """Base class of backbones that map images to the map of the last stage.

    A subclass's constructor calls `_build` with a function that makes each stage; `_build` makes
    all modules in the order of the published models.

    Attributes:
        in_two_dtypes: Whether stages take the residual stream as a pair of tensors: in its own
            dtype, and in the dtype of the matrix products.
        width: Channels of the map.
        stride: Pixels per token of the map, each way.
        stage_widths: Channels of the map of each stage.
        stage_strides: Pixels per token of the map of each stage.
        stage_windows: Rule by which the maps of each stage are cut into windows.
        num_prefix_tokens: 0, since the map has no prefix tokens.
        drop_path_rates: Drop rate of each residual branch: attention, then MLP, of each block.
    """

    num_prefix_tokens = 0
    mean_norm = WindowedTransformer.mean_norm
    in_two_dtypes = False
    layers: nn.ModuleList

    def __init__(
        self,
        embed_dim: int,
        depths: tuple[int, ...],
        *,
        window_size: int,
        patch_size: int,
        drop_path_rate: float,
        size_rule: SizeRule,
        residual: str,
        window_rule: WindowRule = "masked",
        shift_stages: tuple[bool, ...] = (),
        stage_windows: tuple[int, ...] = (),
    ):
        super().__init__()
        self.embed_dim, self.depths, self.window_size = embed_dim, tuple(depths), window_size
        self.patch_size, self.size_rule, self.residual = patch_size, size_rule, residual
        self.stage_widths = tuple(embed_dim * 2**stage for stage in range(len(depths)))
        self.stage_strides = tuple(patch_size * 2**stage for stage in range(len(depths)))
        self.width, self.stride = self.stage_widths[-1], self.stage_strides[-1]
        self.drop_path_rates = linear_rates(drop_path_rate, sum(depths))
        if window_rule == "official" and size_rule != "pad":
            raise ConfigError(
                "student.window_rule: official windows pad every map; got size_rule "
                f"{size_rule!r}, expected 'pad'. Set --student.size_rule pad."
            )
        _one_per_stage("shift_stages", shift_stages, len(depths))
        _one_per_stage("stage_windows", stage_windows, len(depths))
        self.stage_windows = tuple(
            StageWindows(side, shifts, window_rule)
            for side, shifts in zip(
                stage_windows or (window_size,) * len(depths),
                shift_stages or (True,) * len(depths),
                strict=True,
            )
        )

    def _build(
        self,
        stage: Callable[[int], Stage],
        *,
        in_chans: int,
        scheme: Scheme,
        patch_norm: bool,
        norm_eps: float,
        absolute_position: bool,
        image_size: int | tuple[int, int] | None,
    ) -> None:
        self.patch_embed = PatchEmbed(
            self.embed_dim,
            patch_size=self.patch_size,
            in_chans=in_chans,
            scheme=scheme,
            norm_eps=norm_eps if patch_norm else None,
        )
        self.absolute_pos_embed = None
        if absolute_position:
            if image_size is None:
                raise ConfigError(
                    "architecture.image_size: absolute positions need the image size; got none, "
                    "expected pixels. Set architecture.image_size, or leave absolute_position off."
                )
            rows, columns = self._patch_grid(*_pair(image_size))
            self.absolute_pos_embed = nn.Parameter(torch.empty(1, rows * columns, self.embed_dim))
            fill(self.absolute_pos_embed, scheme.token)
        self.layers = nn.ModuleList(stage(s) for s in range(len(self.depths)))
        self.norm = LayerNorm(self.width, norm_eps)

    def blocks(self) -> list[nn.Module]:
        """Returns the blocks in order of execution."""
        return [block for stage in self.layers for block in stage.blocks]

    def outside_blocks(self) -> list[nn.Module]:
        """Returns the modules inside blocks that the blocks' forwards do not call; here none."""
        return []

    def no_weight_decay(self) -> frozenset[str]:
        """Returns the names of parameters that get no weight decay."""
        return frozenset({"absolute_pos_embed"})

    def no_weight_decay_keywords(self) -> tuple[str, ...]:
        """Returns substrings that mark names of parameters that get no weight decay."""
        return ("cpb_mlp", "logit_scale", "relative_position_bias_table")

    @property
    def last_layer(self) -> int:
        """The number of the last layer, which has the final norm: number of blocks + 1.

        Layers are numbered by `layer_id`, for layer-wise learning rates.
        """
        return sum(self.depths) + 1

    def layer_id(self, name: str) -> int:
        """Returns the number of the layer of the parameter `name`, for layer-wise learning rates.

        The patch embedding is layer 0, and block b, counted from 0 over all stages, is layer b + 1.
        A patch merging has the layer of the block before it. All other parameters (final norm,
        absolute positions, shared position biases) are in the last layer.

        Source: the official fine-tuning code, optimizer.py get_swin_layer.
        """
        if name.startswith("patch_embed."):
            return 0
        match = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
        if match is None:
            return self.last_layer
        stage, block = int(match[1]), match[2]
        if block is None:
            return sum(self.depths[: stage + 1])
        return sum(self.depths[:stage]) + int(block) + 1

    def layers_above(self, name: str) -> int:
        """Returns the number of layers after the layer of the parameter `name`.

        Here each patch merging counts as a layer of its own, unlike in `layer_id`.

        Source: models/optimizer.py of SwinTransformer/MIM-Depth-Estimation.
        """
        above = self.last_layer - self.layer_id(name)
        match = re.match(r"(?:patch_embed|layers\.(\d+)\.(blocks|downsample))\.", name)
        if match is None:
            return above
        stage, is_merging = int(match[1] or 0), match[2] == "downsample"
        return above + len(self.depths) - 1 - stage - is_merging

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns (rows, columns) of the map of an image of (height, width) pixels.

        Raises: ShapeError: if the size does not fit and `size_rule` is "drop".
        """
        problem = self._misfit(height, width)
        if problem:
            raise ShapeError(f"{type(self).__name__.lower()} {problem} {self._remedy()}")
        rows, columns = self._patch_grid(height, width)
        for _ in self.depths[1:]:
            rows, columns = -(-rows // 2), -(-columns // 2)
        return rows, columns

    def _patch_grid(self, height: int, width: int) -> tuple[int, int]:
        p = self.patch_size
        if self.size_rule == "drop":
            return height // p, width // p
        return -(-height // p), -(-width // p)

    def _misfit(self, height: int, width: int) -> str:
        """Returns an error message if an image of (height, width) pixels does not fit, else "".

        The message names the first stage that the image does not fit. If `size_rule` is "pad",
        images of every size fit.
        """
        rows, columns = self._patch_grid(height, width)
        if min(rows, columns) < 1:
            return (
                f"patch_embed: image smaller than a patch; got {height}x{width} pixels, expected "
                f"at least {self.patch_size}x{self.patch_size}."
            )
        if self.size_rule == "pad":
            return ""
        for stage in range(len(self.depths)):
            window = self.stage_windows[stage].over(rows, columns, 0).side
            if rows % window or columns % window:
                return (
                    f"stage {stage}: the map does not divide into its windows; got a map of "
                    f"{rows}x{columns} tokens, expected multiples of the window {window} "
                    f"({height}x{width} pixels)."
                )
            if stage + 1 < len(self.depths):
                if rows % 2 or columns % 2:
                    return (
                        f"stage {stage}: patch merging needs even sides; got a map of "
                        f"{rows}x{columns} tokens, expected multiples of 2 "
                        f"({height}x{width} pixels)."
                    )
                rows, columns = rows // 2, columns // 2
        return ""

    def _remedy(self) -> str:
        candidates = (k * self.stride for k in range(1, 129))
        sizes = [str(s) for s in candidates if not self._misfit(s, s)]
        return (
            f"Use an image size that fits (square: {', '.join(sizes[:8])}, ...), another window, "
            "or --student.size_rule pad."
        )

    def stages(self, images: Tensor, keep: Tensor | None = None) -> tuple[Tensor, ...]:
        """Returns each stage's map (B, H_s, W_s, C_s), before patch merging and without final norm.

        Args:
            images: (B, 3, H, W), normalised images of any float dtype.
            keep: (num_branches, B) bool, True where drop path keeps a branch; None keeps all.
        """
        # The module is called, not forward, so that the hooks of ZeRO-3 run.
        return self(images, keep, every_stage=True)

    def forward(
        self, images: Tensor, keep: Tensor | None = None, *, every_stage: bool = False
    ) -> FeatureMap | tuple[Tensor, ...]:
        """Maps normalised images to tokens after the final norm, or to the maps of all stages.

        Args:
            images: (B, 3, H, W), any float dtype.
            keep: (num_branches, B) bool, True where drop path keeps a branch; None keeps all.
            every_stage: Whether to return each stage's map, before patch merging and without the
                final norm, instead of the last stage's tokens.

        Returns: tokens (B, N, C) without prefix tokens, or with `every_stage` the map
            (B, H_s, W_s, C_s) of each stage; in the dtype of the residual stream.
        Raises: ShapeError: if the image size does not fit, or `keep` has the wrong shape.
        """
        maps = self._stages(images, keep)
        if every_stage:
            return tuple(maps)
        x = self.norm(deque(maps, maxlen=1).pop())
        grid = (x.shape[1], x.shape[2])
        return FeatureMap(rearrange(x, "b h w c -> b (h w) c"), grid, 0)

    def _stages(self, images: Tensor, keep: Tensor | None) -> Iterator[Tensor]:
        if images.dim() != 4:
            raise ShapeError(
                f"{type(self).__name__.lower()}: not a batch of images; got shape "
                f"{tuple(images.shape)}, expected (B, channels, H, W). Add the batch dimension."
            )
        height, width = images.shape[-2:]
        self.grid(height, width)  # Refuses a size that does not fit.
        scales = branch_scales(keep, self.drop_path_rates, images.shape[0], images.device)
        if self.size_rule == "pad":
            p = self.patch_size
            images = F.pad(images, (0, -width % p, 0, -height % p))
        stream = self._patches(images)
        site = 0
        for stage, depth in zip(self.layers, self.depths, strict=True):
            sites = slice(site, site + 2 * depth)
            stream = stage(stream, None if scales is None else scales[sites])
            yield stream[0] if self.in_two_dtypes else stream
            if stage.downsample is not None:
                stream = stage.downsample(stream)
            site += 2 * depth

    def _patches(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Returns patch embeddings plus absolute positions, (B, H/p, W/p, C); p is a patch's side.

        If `in_two_dtypes`, returns the sum twice: in the dtype of the residual stream, and in the
        dtype of the weights.

        Args:
            images: (B, 3, H, W), normalised images.
        """
        compute = self.patch_embed.proj.weight.dtype
        dtype = residual_dtype(self.residual, compute)
        stream = self.patch_embed(images, dtype, compute if self.in_two_dtypes else None)
        if self.absolute_pos_embed is None:
            return stream
        x = stream[0] if self.in_two_dtypes else stream
        x = x + self._positions(x).to(dtype)
        return (x, x.to(compute)) if self.in_two_dtypes else x

    def _positions(self, x: Tensor) -> Tensor:
        rows, columns = x.shape[1:3]
        if self.absolute_pos_embed.shape[1] != rows * columns:
            raise ShapeError(
                f"{type(self).__name__.lower()}: absolute positions for another image size; got "
                f"{rows}x{columns} patches, expected {self.absolute_pos_embed.shape[1]}. Set "
                "architecture.image_size to the image's, or resize the positions."
            )
        return self.absolute_pos_embed.view(1, rows, columns, -1)


class Stage(nn.Module):
    """The blocks of one stage, and the patch merging `downsample` that follows them.

    `downsample` is None if no patch merging follows. `forward` runs the blocks alone; the backbone
    calls `downsample`.
    """

    def __init__(self, blocks: Iterable[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks, self.downsample = nn.ModuleList(blocks), downsample

    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """Runs the blocks, which map (B, H, W, C) to the same shape.

        Args:
            x: (B, H, W, C), the residual stream.
            scales: (2 * depth, B) float32, drop path's factors; None without drop path.
        """
        for i, block in enumerate(self.blocks):
            x = block(x, None if scales is None else scales[2 * i : 2 * i + 2])
        return x


class PatchMerging(nn.Module):
    """Concatenates the channels of each 2x2 tokens; odd sides of a map are padded with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps `x` from (B, H, W, C) to (B, ceil(H/2), ceil(W/2), 4C).

        The (row, column) of the four tokens are in the order (0, 0), (1, 0), (0, 1), (1, 1).
        """
        bottom, right = x.shape[1] % 2, x.shape[2] % 2
        if bottom or right:
            x = F.pad(x, (0, 0, 0, right, 0, bottom))
        return rearrange(x, "b (h i) (w j) c -> b h w (j i c)", i=2, j=2)


def _one_per_stage(field: str, values: Sequence[int], stages: int) -> None:
    if len(values) not in (0, stages):
        raise ConfigError(
            f"student.{field}: needs a value for each stage; got {len(values)} for a model of "
            f"{stages} stages, expected {stages}, or none. Change --student.{field}."
        )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])

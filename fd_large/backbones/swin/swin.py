"""Swin Transformer (first version): pre-norm blocks, dot-product attention, position tables.

Parameter names are those of the Swin-Transformer and EsViT repositories. A model with three stages
has no patch merging after the third stage, and a final norm of the third stage's width.
Feature-Distillation uses such a model as the teacher for targets from stage 3.

timm's Swin gives the same result only if windows divide every map. Otherwise timm's padding takes
part in attention, and the image size for which a timm model is built decides whether the model's
windows shift. For images of 140x100 pixels, timm's maps differ from the maps of `window_rule`
"masked" by half of the largest value in the maps, and from the maps of "official" by a quarter of
it. Students that pad therefore need this module.

Source: Liu et al., arXiv 2103.14030; Li et al., arXiv 2106.09785.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from fd_large.backbones.attention_maps import attention_maps
from fd_large.backbones.family import Options
from fd_large.backbones.hierarchical import HierarchicalBackbone, PatchMerging, SizeRule, Stage
from fd_large.backbones.initialization import (
    NONE,
    OFFICIAL,
    Draw,
    Initialization,
    Scheme,
    fill,
    scheme,
)
from fd_large.backbones.layers import AddNorm, LayerNorm, Linear, Mlp
from fd_large.backbones.swin.architecture import SwinArchitecture
from fd_large.backbones.token_positions import TokenPositions, positions_in
from fd_large.backbones.windows import StageWindows, WindowRule, Windows
from fd_large.errors import ConfigError, ShapeError
from fd_large.kernels.add_norm import add_branch
from fd_large.kernels.window_attention import window_attention
from fd_large.kernels.window_attention_reference import Memory

# FD has no scheme of its own for Swin V1, which is a teacher only.
_SCHEMES = {"fd": OFFICIAL, "official": OFFICIAL, "none": NONE}


class Swin(HierarchicalBackbone):
    """Swin V1 backbone.

    Arguments with the names of fields of `SwinArchitecture` and `Options` have the same meaning,
    except `qkv_bias`, which says whether query, key and value have a bias.

    Args:
        image_size: Side in pixels of the images for which position tables are made. A stage whose
            map is smaller than the window has a table of the map's size.
        in_chans: Channels of the images.

    Raises: ConfigError, ShapeError: for values that do not fit each other.
    """

    def __init__(
        self,
        embed_dim: int,
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        *,
        window_size: int,
        image_size: int,
        patch_size: int = 4,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        absolute_position: bool = False,
        drop_path_rate: float = 0.0,
        size_rule: SizeRule = "drop",
        window_rule: WindowRule = "masked",
        shift_stages: tuple[bool, ...] = (),
        attention_memory: Memory = "keep",
        residual_dtype: str = "compute",
        norm_eps: float = 1e-5,
        initialization: Initialization = "fd",
    ):
        super().__init__(
            embed_dim,
            depths,
            window_size=window_size,
            patch_size=patch_size,
            drop_path_rate=drop_path_rate,
            size_rule=size_rule,
            residual=residual_dtype,
            window_rule=window_rule,
            shift_stages=shift_stages,
        )
        self.grid(image_size, image_size)  # Refuses a size that does not fit.
        initial = scheme(_SCHEMES, initialization)
        side = image_size // patch_size

        def stage(s: int) -> Stage:
            width = embed_dim * 2**s
            windows = replace(self.stage_windows[s], side=min(window_size, side // 2**s))
            # Blocks first: random weights are drawn in the order of construction.
            blocks = [
                Block(
                    width,
                    num_heads[s],
                    index=i,
                    windows=windows,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    attention_memory=attention_memory,
                    norm_eps=norm_eps,
                    scheme=initial,
                )
                for i in range(depths[s])
            ]
            last = s + 1 == len(depths)
            return Stage(blocks, None if last else Downsample(width, norm_eps, initial))

        self._build(
            stage,
            in_chans=in_chans,
            scheme=initial,
            patch_norm=patch_norm,
            norm_eps=norm_eps,
            absolute_position=absolute_position,
            image_size=image_size,
        )


class Block(nn.Module):
    """Pre-norm block: x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        index: int,
        windows: StageWindows,
        mlp_ratio: float,
        qkv_bias: bool,
        attention_memory: Memory,
        norm_eps: float,
        scheme: Scheme,
    ):
        super().__init__()
        # Only the parity, which decides the windows: torch.compile makes a graph for each value.
        self.parity, self.windows = index % 2, windows
        self.norm1 = LayerNorm(width, norm_eps)
        self.attn = WindowAttention(
            width,
            num_heads,
            window_size=windows.side,
            qkv_bias=qkv_bias,
            memory=attention_memory,
            draw=scheme.linear,
            table=scheme.table,
        )
        self.norm2 = AddNorm(width, norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), draw=scheme.linear, end=scheme.linear)

    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """Maps (B, H, W, C) to the same shape.

        Args:
            x: (B, H, W, C), the residual stream.
            scales: (2, B) float32, drop path's factors of attention and MLP; None without drop
                path.

        Raises: ShapeError: if the map is smaller than the window of the position table.
        """
        height, width = x.shape[1:3]
        side, windows = self.windows.side, self.windows.over(height, width, self.parity)
        if windows.side != side:
            raise ShapeError(
                f"swin: the map is smaller than the position table's window; got {height}x{width} "
                f"tokens, expected at least {side}x{side}. Set "
                "architecture.image_size to the image's size, or use larger images."
            )
        compute = self.attn.qkv.weight.dtype
        branch = self.attn(self.norm1(x, compute), windows)
        first, second = (None, None) if scales is None else scales
        x, normed = self.norm2(x, branch, first, None, compute)
        return add_branch(x, self.mlp(normed), second)


class WindowAttention(nn.Module):
    """Dot-product attention in a window with a table of relative position biases."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        window_size: int,
        qkv_bias: bool,
        memory: Memory,
        draw: Draw,
        table: Draw,
    ):
        super().__init__()
        self.num_heads, self.memory = num_heads, memory
        rows = (2 * window_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        fill(self.relative_position_bias_table, table)
        self.qkv = Linear(width, 3 * width, draw=draw, bias=qkv_bias)
        self.proj = Linear(width, width, draw=draw)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """Maps tokens x, (B, H, W, C), to the same shape by attention within `windows`."""
        table = self.relative_position_bias_table
        out = window_attention(
            self.qkv(windows.pad(x)),
            num_heads=self.num_heads,
            window=windows.side,
            shift=windows.shift,
            scale=(x.shape[-1] // self.num_heads) ** -0.5,
            cosine=False,
            table=table.to(torch.promote_types(table.dtype, torch.float32)),
            memory=self.memory,
        )
        return self.proj(windows.crop(out))

    def attention_maps(self, x: Tensor, windows: Windows) -> tuple[Tensor, TokenPositions]:
        """Returns the attention maps of a map cut into windows, and the positions of their tokens.

        Args:
            x: (B, H, W, C), the input of `forward`.
            windows: Windows over the map.

        Returns: the maps, (B, nW, h, T, T) float32, for h heads and nW windows of T tokens; and the
            positions of the windows' tokens in the image.
        """
        padded = windows.pad(x)
        maps = attention_maps(
            self.qkv(padded).flatten(1, 2),
            positions_in(padded, windows),
            num_heads=self.num_heads,
            scale=(x.shape[-1] // self.num_heads) ** -0.5,
            cosine=False,
            table=self.relative_position_bias_table,
            shift=windows.shift,
        )
        return maps, positions_in(x, windows)


class Downsample(PatchMerging):
    """Patch merging of Swin V1: a norm of 2x2 concatenated tokens, then the linear reduction."""

    def __init__(self, width: int, norm_eps: float, scheme: Scheme):
        super().__init__()
        self.norm = LayerNorm(4 * width, norm_eps)
        self.reduction = Linear(4 * width, 2 * width, draw=scheme.linear, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C)."""
        merged = self.norm(super().forward(x), self.reduction.weight.dtype)
        return self.reduction(merged).to(x.dtype)


def build(a: SwinArchitecture, options: Options) -> Swin:
    """Builds the model `a` with newly drawn weights.

    Raises:
        ConfigError: If `options` has `stage_windows`, since the position tables decide the windows.
    """
    rules = options.of_windows()
    if own_windows := rules.pop("stage_windows"):
        raise ConfigError(
            "student.stage_windows: a Swin model's position tables decide its windows; got "
            f"{own_windows}, expected none. Set --student.architecture.window_size."
        )
    arguments = vars(a) | {"qkv_bias": a.qkv_bias != "none", **rules}
    return Swin(**arguments, **options.of_all())

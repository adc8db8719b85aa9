"""Swin Transformer (first version) as EsViT's teacher: pre-norm, dot product, position tables.

Parameter names are those of the Swin-Transformer and EsViT repositories. With three stages it is
FD's stage-3 target: no merging after the last stage, the final norm on its width.

Source: Liu et al., arXiv 2103.14030; Li et al., arXiv 2106.09785.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fd_large.backbones.family import Options
from fd_large.backbones.hierarchical import HierarchicalBackbone, PatchMerging, SizeRule
from fd_large.backbones.initialization import Draw, Initialization, Scheme, fill, scheme
from fd_large.backbones.layers import AddNorm, LayerNorm, Linear, Mlp
from fd_large.backbones.swin.architecture import SwinArchitecture
from fd_large.backbones.windows import fit_window, window_shift
from fd_large.errors import ConfigError, ShapeError
from fd_large.kernels.residual_norm import add_branch
from fd_large.kernels.window_attention import window_attention
from fd_large.kernels.window_attention_reference import Memory


class Swin(HierarchicalBackbone):
    """Swin V1 backbone.

    Args:
        embed_dim: Channels of the first stage.
        depths: Blocks of each stage, any number of stages.
        num_heads: Heads of each stage.
        window_size: Side of a window in tokens.
        image_size: Pixels for which the position tables are made: a stage whose map is smaller
            than the window has a table of the map's size.
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the images.
        mlp_ratio: Hidden width of the MLP over the width.
        qkv_bias: Whether query, key and value have a bias.
        patch_norm: Whether the patch embedding ends with a norm.
        absolute_position: Whether a learned embedding is added to the patches.
        drop_path_rate: Of the last block; blocks before rise linearly from 0.
        size_rule: "drop": pixels beyond the patch grid are dropped and other misfits are errors;
            "pad": image, windows and merging are padded right and bottom, and padding is masked.
        attention_memory: "keep" or "recompute" attention maps for backward.
        residual_dtype: "compute": that of the weights; "float32": at least that.
        norm_eps: Of every norm.
        initialization: "fd", "official" (the same here) or "none".

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
        )
        if len(depths) != len(num_heads):
            raise ConfigError(
                f"swin: depths and num_heads must agree in length; got {len(depths)} and "
                f"{len(num_heads)}, expected equal. Give one value per stage."
            )
        self.grid(image_size, image_size)  # Refuses a size that does not fit.
        initial = scheme("swin", initialization)
        self._embed(
            in_chans=in_chans,
            scheme=initial,
            patch_norm=patch_norm,
            norm_eps=norm_eps,
            absolute_position=absolute_position,
            image_size=image_size,
        )
        side = image_size // patch_size
        self.layers = nn.ModuleList(
            Stage(
                embed_dim * 2**s,
                depths[s],
                num_heads[s],
                merge=s + 1 < len(depths),
                window_size=min(window_size, side // 2**s),
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                attention_memory=attention_memory,
                norm_eps=norm_eps,
                scheme=initial,
            )
            for s in range(len(depths))
        )
        self._finish(norm_eps)


class Stage(nn.Module):
    """Blocks of one width; `downsample`, which merges patches, runs after them, by the net."""

    def __init__(
        self,
        width: int,
        depth: int,
        num_heads: int,
        *,
        merge: bool,
        window_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        attention_memory: Memory,
        norm_eps: float,
        scheme: Scheme,
    ):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(
                width,
                num_heads,
                index=i,
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                attention_memory=attention_memory,
                norm_eps=norm_eps,
                scheme=scheme,
            )
            for i in range(depth)
        )
        self.downsample = Downsample(width, norm_eps, scheme) if merge else None

    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """Maps (B, H, W, C) to the same shape."""
        for i, block in enumerate(self.blocks):
            x = block(x, None if scales is None else scales[2 * i : 2 * i + 2])
        return x


class Block(nn.Module):
    """x + attention(norm1(x)), x + mlp(norm2(x))."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        index: int,
        window_size: int,
        mlp_ratio: float,
        qkv_bias: bool,
        attention_memory: Memory,
        norm_eps: float,
        scheme: Scheme,
    ):
        super().__init__()
        self.index, self.window_size = index, window_size
        self.norm1 = LayerNorm(width, norm_eps)
        self.attn = WindowAttention(
            width,
            num_heads,
            window_size=window_size,
            qkv_bias=qkv_bias,
            memory=attention_memory,
            draw=scheme.linear,
            table=scheme.table,
        )
        self.norm2 = AddNorm(width, norm_eps)
        self.mlp = Mlp(width, int(width * mlp_ratio), draw=scheme.linear, end=scheme.linear)

    def forward(self, x: Tensor, scales: Tensor | None = None) -> Tensor:
        """Maps (B, H, W, C) to the same shape; scales (2, B) are drop path's factors."""
        height, width = x.shape[1:3]
        if fit_window(height, width, self.window_size) != self.window_size:
            raise ShapeError(
                f"swin: the map is smaller than the position table's window; got {height}x{width} "
                f"tokens, expected at least {self.window_size}x{self.window_size}. Set "
                "architecture.image_size to the image's size, or use larger images."
            )
        shift = window_shift(height, width, self.window_size, self.index)
        compute = self.attn.qkv.weight.dtype
        branch = self.attn(self.norm1(x, compute), shift)
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
        self.num_heads, self.window_size, self.memory = num_heads, window_size, memory
        rows = (2 * window_size - 1) ** 2
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        fill(self.relative_position_bias_table, table)
        self.qkv = Linear(width, 3 * width, draw=draw, bias=qkv_bias)
        self.proj = Linear(width, width, draw=draw)

    def forward(self, x: Tensor, shift: int) -> Tensor:
        """Maps (B, H, W, C) to the same shape; windows are shifted by so many tokens."""
        table = self.relative_position_bias_table
        out = window_attention(
            self.qkv(x),
            num_heads=self.num_heads,
            window=self.window_size,
            shift=shift,
            scale=(x.shape[-1] // self.num_heads) ** -0.5,
            cosine=False,
            table=table.to(torch.promote_types(table.dtype, torch.float32)),
            memory=self.memory,
        )
        return self.proj(out)


class Downsample(PatchMerging):
    """Patch merging of Swin V1: norm of the four tokens first, then the reduction."""

    def __init__(self, width: int, norm_eps: float, scheme: Scheme):
        super().__init__()
        self.norm = LayerNorm(4 * width, norm_eps)
        self.reduction = Linear(4 * width, 2 * width, draw=scheme.linear, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C)."""
        merged = self.norm(super().forward(x), self.reduction.weight.dtype)
        return self.reduction(merged).to(x.dtype)


def build(a: SwinArchitecture, options: Options) -> Swin:
    """Builds a model with fresh weights."""
    return Swin(
        a.embed_dim,
        a.depths,
        a.num_heads,
        window_size=a.window_size,
        patch_size=a.patch_size,
        image_size=a.image_size,
        mlp_ratio=a.mlp_ratio,
        qkv_bias=a.qkv_bias == "fused",
        patch_norm=a.patch_norm,
        absolute_position=a.absolute_position,
        norm_eps=a.norm_eps,
        drop_path_rate=options.drop_path_rate,
        size_rule=options.size_rule,
        attention_memory=options.attention_memory,
        residual_dtype=options.residual_dtype,
        initialization=options.initialization,
    )

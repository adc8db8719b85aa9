"""Vision transformers: Feature-Distillation's students and the CLIP, DINO and DeiT teachers.

The students have tables of relative positions.

Blocks are pre-norm, and the grid of patches has a fixed size unless positions are resized.
Parameter names are those of DINO, timm and the Feature-Distillation repository; the names in CLIP's
files are translated when the weights are read.

Sources: Dosovitskiy et al., arXiv 2010.11929; Wei et al., arXiv 2205.14141; Bao et al., arXiv
2106.08254 (relative position table and LayerScale); Radford et al., arXiv 2103.00020 (CLIP).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fd_large.backbones.attention_maps import attention_maps, with_query_bias
from fd_large.backbones.drop_path import branch_scales, linear_rates
from fd_large.backbones.family import Options
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.initialization import (
    CUT_AT_ONE_SIGMA,
    NONE,
    OFFICIAL,
    ZEROS,
    Draw,
    Initialization,
    Scheme,
    fill,
    scheme,
)
from fd_large.backbones.layers import AddNorm, LayerNorm, Linear, Mlp, PatchEmbed, residual_dtype
from fd_large.backbones.position_tables import Grid, fit_offsets, fit_positions
from fd_large.backbones.token_positions import TokenPositions, image_positions, window_positions
from fd_large.backbones.vit.architecture import ViTArchitecture
from fd_large.errors import ConfigError, ShapeError
from fd_large.kernels.add_norm import add_branch
from fd_large.kernels.window_attention import image_attention, window_attention
from fd_large.kernels.window_attention_reference import Memory, position_index

QkvBias = Literal["none", "qv", "qkv", "fused"]
RelativePosition = Literal["none", "shared", "block"]
_POSITIONAL = ("embed_dim", "depths", "num_heads")
_SCHEMES = {
    "fd": Scheme(CUT_AT_ONE_SIGMA, CUT_AT_ONE_SIGMA, ZEROS, CUT_AT_ONE_SIGMA, ZEROS, True, 1.0),
    "official": replace(OFFICIAL, table=ZEROS, post_norm_weight=1.0),
    "none": NONE,
}


class ViT(nn.Module):
    """Vision transformer backbone.

    Arguments with the names of fields of `ViTArchitecture` and `Options` have the same meaning. A
    ViT has one stage, of `depth` blocks with `num_heads` heads.

    Args:
        image_size: Side or (height, width) in pixels of the images for which positions are made.
        in_chans: Channels of the images.
        resizes_positions: Whether a forward resizes the positions to images of another size
            (position_tables.py); otherwise images of another size are refused.

    Attributes:
        width: Channels of the map.
        stride: Pixels per token, each way.
        attends_in_windows: Whether the blocks can attend within windows (`Block.forward`).
        encodes_some: Whether the model can encode a subset of the patches (`places` of `forward`).
        num_prefix_tokens: Number of CLS and distillation tokens of the map, which has no registers.
        depths: (number of blocks,), a tuple for the only stage.
        drop_path_rates: Drop rate of each residual branch: attention, then MLP, of each block.

    Raises: ConfigError: for values that do not fit each other.
    """

    mean_norm = ViTArchitecture.mean_norm
    attends_in_windows = True

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        *,
        patch_size: int,
        image_size: int | tuple[int, int],
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        class_token: bool = True,
        distillation_token: bool = False,
        keep_distillation_token: bool = True,
        absolute_position: bool = True,
        relative_position: RelativePosition = "none",
        layer_scale: float = 0.0,
        qkv_bias: QkvBias = "fused",
        pre_norm_layer: bool = False,
        class_position: bool = True,
        num_registers: int = 0,
        patch_bias: bool = True,
        activation: str = "gelu",
        norm_eps: float = 1e-6,
        drop_path_rate: float = 0.0,
        attention_memory: Memory = "keep",
        residual_dtype: str = "compute",
        initialization: Initialization = "fd",
        resizes_positions: bool = False,
    ):
        super().__init__()
        if resizes_positions and relative_position == "block":
            raise ConfigError(
                "architecture.relative_position: several image sizes need a single table of "
                "positions; got 'block', expected 'shared' or 'none'. Set one of these, or leave "
                "--data.image_sizes out."
            )
        self.resizes_positions = resizes_positions
        initial = scheme(_SCHEMES, initialization)
        height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.width, self.patch_size, self.stride = embed_dim, patch_size, patch_size
        self.image_grid = (height // patch_size, width // patch_size)
        self.residual = residual_dtype
        self.depths = (depth,)
        self.drop_path_rates = linear_rates(drop_path_rate, depth)
        self.class_position = class_position
        num_tokens = int(class_token) + int(distillation_token)
        dropped = int(distillation_token and not keep_distillation_token)
        self.num_prefix_tokens = num_tokens - dropped
        self.left_out = slice(self.num_prefix_tokens, num_tokens + num_registers)

        def token(*shape: int) -> nn.Parameter:
            parameter = nn.Parameter(torch.empty(1, *shape))
            fill(parameter, initial.token)
            return parameter

        rows, columns = self.image_grid
        self.cls_token = token(1, embed_dim) if class_token else None
        self.dist_token = token(1, embed_dim) if distillation_token else None
        positions = rows * columns + (num_tokens if class_position else 0)
        self.pos_embed = token(positions, embed_dim) if absolute_position else None
        self.reg_token = token(num_registers, embed_dim) if num_registers else None
        self.patch_embed = PatchEmbed(
            embed_dim, patch_size=patch_size, in_chans=in_chans, scheme=initial, bias=patch_bias
        )
        self.prefix_rows = 3 if num_tokens + num_registers else 0
        table_rows = (2 * rows - 1) * (2 * columns - 1) + self.prefix_rows
        self.has_relative_position = relative_position != "none"
        self.encodes_some = relative_position != "block"
        self.rel_pos_bias = (
            RelativePositionBias(table_rows, num_heads, initial.table)
            if relative_position == "shared"
            else None
        )
        self.norm_pre = LayerNorm(embed_dim, norm_eps) if pre_norm_layer else None
        self.blocks = Blocks(
            Block(
                embed_dim,
                num_heads,
                number=i + 1,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                table_rows=table_rows if relative_position == "block" else 0,
                layer_scale=layer_scale,
                activation=activation,
                attention_memory=attention_memory,
                norm_eps=norm_eps,
                scheme=initial,
            )
            for i in range(depth)
        )
        self.norm = LayerNorm(embed_dim, norm_eps)

    def outside_blocks(self) -> list[nn.Module]:
        """Returns the modules inside blocks that the blocks' forwards do not call; here none."""
        return []

    def no_weight_decay(self) -> frozenset[str]:
        """Returns the names of parameters that get no weight decay."""
        return frozenset({"pos_embed", "cls_token", "dist_token", "reg_token"})

    def no_weight_decay_keywords(self) -> tuple[str, ...]:
        """Returns an empty tuple: as published, position tables have weight decay."""
        return ()

    @property
    def last_layer(self) -> int:
        """The number of the last layer, which has the final norm: number of blocks + 1.

        Layers are numbered by `layer_id`, for layer-wise learning rates.
        """
        return len(self.blocks) + 1

    def layer_id(self, name: str) -> int:
        """Returns the number of the layer of the parameter `name`, for layer-wise learning rates.

        Patch embedding, prefix tokens, registers and absolute positions are layer 0. Block b,
        counted from 0, is layer b + 1. All other parameters (norms outside the blocks, shared
        table) are in the last layer.

        Source: the official fine-tuning code, optimizer.py get_vit_layer.
        """
        tokens = ("cls_token", "dist_token", "reg_token")
        if name.startswith((*tokens, "pos_embed", "patch_embed.")):
            return 0
        block = re.match(r"blocks\.(\d+)\.", name)
        return int(block[1]) + 1 if block else self.last_layer

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Returns (rows, columns) of the map of an image of (height, width) pixels.

        Raises:
            ShapeError: If the size is not a multiple of the patch, or the positions are made for
                another size and cannot be resized.
        """
        p = self.patch_size
        if height % p or width % p or min(height, width) < p:
            raise ShapeError(
                f"vit patch_embed: the image does not divide into patches; got {height}x{width} "
                f"pixels, expected multiples of {p}. Change --data.image_size."
            )
        grid = height // p, width // p
        has_positions = self.has_relative_position or self.pos_embed is not None
        if has_positions and grid != self.image_grid and not self.resizes_positions:
            rows, columns = self.image_grid
            raise ShapeError(
                f"vit: positions belong to another image size; got {grid[0]}x{grid[1]} patches "
                f"({height}x{width} pixels), expected {rows}x{columns} ({rows * p}x{columns * p} "
                "pixels). Set architecture.image_size to the image's size, or resize the image."
            )
        return grid

    def forward(
        self, images: Tensor, keep: Tensor | None = None, places: Tensor | None = None
    ) -> FeatureMap:
        """Maps normalised images to prefix and patch tokens after the final norm.

        Args:
            images: (B, 3, H, W), any float dtype.
            keep: (num_branches, B) bool, True where drop path keeps a branch; None keeps all.
            places: (B, V) int64, for each image the numbers of the V patches that are encoded,
                where patches are counted row by row from 0. Other patches are dropped after
                positions are added. None encodes all patches.

        Returns: tokens (B, num_prefix_tokens + N, C) in the dtype of the residual stream, without
            registers. With `places`, there are V patch tokens instead of N, in the order given.
        Raises: ShapeError: if the image size does not fit, or `keep` has the wrong shape.
        """
        if images.dim() != 4:
            raise ShapeError(
                f"vit: not a batch of images; got shape {tuple(images.shape)}, expected "
                "(B, channels, H, W). Add the batch dimension."
            )
        for x in self.after_blocks(images, keep, places):  # noqa: B007 (the last one)
            pass
        x = self.norm(x)
        if self.left_out.stop > self.left_out.start:
            x = torch.cat([x[:, : self.left_out.start], x[:, self.left_out.stop :]], dim=1)
        return FeatureMap(x, self.grid(*images.shape[-2:]), self.num_prefix_tokens)

    def after_blocks(
        self, images: Tensor, keep: Tensor | None = None, places: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Yields the residual stream after each block, before the final norm.

        Args:
            images: (B, 3, H, W), normalised images of any float dtype.
            keep: (num_branches, B) bool, True where drop path keeps a branch; None keeps all.
            places: (B, V) int64, for each image the numbers of the V patches that are encoded,
                counted row by row from 0; None encodes all N patches.

        Yields: (B, P + N, C), or with `places` (B, P + V, C): P tokens (CLS, distillation token,
            registers), then the patches.
        """
        grid = self.grid(*images.shape[-2:])
        x, scales, table = self._before_blocks(images, keep, grid)
        if places is not None:
            x, table = _at(places, x, table, grid)
        for i, block in enumerate(self.blocks):
            x = block(x, None if scales is None else scales[2 * i : 2 * i + 2], table, grid)
            yield x

    def _before_blocks(
        self, images: Tensor, keep: Tensor | None, grid: Grid
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns the inputs of the blocks.

        Args:
            images: (B, 3, H, W), normalised images of any float dtype.
            keep: (num_branches, B) bool, True where drop path keeps a branch; None keeps all.
            grid: Rows and columns of the N patches.

        Returns: tokens (B, P + N, C), with P prefix tokens and registers; drop path's factors
            (num_branches, B), or None without `keep`; and the shared table of position biases (R,
            h) of R offsets and h heads, or None if the model has none.
        """
        batch_size = images.shape[0]
        scales = branch_scales(keep, self.drop_path_rates, batch_size, images.device)
        dtype = residual_dtype(self.residual, self.patch_embed.proj.weight.dtype)
        patches = rearrange(self.patch_embed(images, dtype), "b h w c -> b (h w) c")
        prefix = [t for t in (self.cls_token, self.dist_token) if t is not None]
        tokens = [t.to(dtype).expand(batch_size, -1, -1) for t in prefix]
        positions = None if self.pos_embed is None else self._positions(grid).to(dtype)
        if positions is not None and not self.class_position:
            patches, positions = patches + positions, None
        x = torch.cat([*tokens, patches], dim=1)
        if positions is not None:
            x = x + positions
        if self.reg_token is not None:
            registers = self.reg_token.to(dtype).expand(batch_size, -1, -1)
            x = torch.cat([x[:, : len(prefix)], registers, x[:, len(prefix) :]], dim=1)
        if self.norm_pre is not None:
            x = self.norm_pre(x)
        return x, scales, None if self.rel_pos_bias is None else self._offsets(grid)

    def _positions(self, grid: Grid) -> Tensor:
        """Returns the absolute positions for N patches, (1, prefix + N, C), resized if necessary.

        The rows of prefix tokens, if the positions have any, come first.

        Args:
            grid: Rows and columns of the patches.
        """
        if grid == self.image_grid:
            return self.pos_embed
        prefix = self.pos_embed.shape[1] - self.image_grid[0] * self.image_grid[1]
        patches = fit_positions(self.pos_embed, self.image_grid, grid).flatten(1, 2)
        return torch.cat([self.pos_embed[:, :prefix].to(patches.dtype), patches], dim=1)

    def _offsets(self, grid: Grid) -> Tensor:
        """Returns the shared table of relative positions for a grid, resized if necessary.

        Args:
            grid: Rows and columns of the patches, (H, W).

        Returns: (R, h) float32 for h heads, with R = (2H - 1)(2W - 1) rows, and after these 3 rows
            for prefix tokens and registers if the model has any.
        """
        table = self.rel_pos_bias()
        if grid == self.image_grid:
            return table
        rows, columns = self.image_grid
        patches, prefix = table.split([(2 * rows - 1) * (2 * columns - 1), self.prefix_rows])
        return torch.cat([fit_offsets(patches, self.image_grid, grid), prefix])


class Blocks(nn.ModuleList):
    """The list of a ViT's blocks, which can be called like the method `blocks()` of backbones.

    The published parameter names require that the attribute `blocks` is the list itself.
    """

    def __call__(self) -> list[nn.Module]:
        """Returns the blocks in order of execution."""
        return list(self)


class Block(nn.Module):
    """Pre-norm block: x + gamma_1 * attention(norm1(x)), then x + gamma_2 * mlp(norm2(x)).

    Args:
        width: Number of channels, C.
        num_heads: Number of heads, h.
        number: Number of the block in the model, from 1. The larger the number, the smaller are the
            initial last weights of the two branches.
        table_rows: Rows of the block's own position table; 0 means no table.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        number: int,
        mlp_ratio: float,
        qkv_bias: QkvBias,
        table_rows: int,
        layer_scale: float,
        activation: str,
        attention_memory: Memory,
        norm_eps: float,
        scheme: Scheme,
    ):
        super().__init__()
        end = scheme.branch_end(2 * number)
        self.gamma_1 = self.gamma_2 = None
        if layer_scale:
            self.gamma_1, self.gamma_2 = (nn.Parameter(torch.empty(width)) for _ in range(2))
            nn.init.constant_(self.gamma_1, layer_scale)
            nn.init.constant_(self.gamma_2, layer_scale)
        self.norm1 = LayerNorm(width, norm_eps)
        self.attn = Attention(
            width,
            num_heads,
            qkv_bias=qkv_bias,
            table_rows=table_rows,
            memory=attention_memory,
            scheme=scheme,
            end=end,
        )
        self.norm2 = AddNorm(width, norm_eps)
        self.mlp = Mlp(
            width, int(width * mlp_ratio), draw=scheme.linear, end=end, activation=activation
        )

    def forward(
        self,
        x: Tensor,
        scales: Tensor | None,
        table: Tensor | None,
        grid: tuple[int, int],
        window: int = 0,
    ) -> Tensor:
        """Maps (B, N, C) to the same shape.

        Args:
            x: (B, N, C), the residual stream.
            scales: (2, B) float32, drop path's factors of attention and MLP; None without drop
                path.
            table: The shared position table, (R, h) float32, or the position biases of each image,
                (B, h, N, N); None if the block has its own table or there is no table.
            grid: Rows and columns of the patches.
            window: Side in tokens of the windows within which patches attend, without prefix
                tokens; 0 means that every token attends to all tokens.
        """
        compute = self.attn.qkv.weight.dtype
        branch = self.attn(self.norm1(x, compute), table, grid, window)
        first, second = (None, None) if scales is None else scales
        x, normed = self.norm2(x, branch, first, self.gamma_1, compute)
        return add_branch(x, self.mlp(normed), second, self.gamma_2)


class Attention(nn.Module):
    """Dot-product attention among all tokens of an image, or within windows."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        qkv_bias: QkvBias,
        table_rows: int,
        memory: Memory,
        scheme: Scheme,
        end: Draw,
    ):
        super().__init__()
        self.num_heads, self.memory = num_heads, memory
        self.qkv = Linear(width, 3 * width, draw=scheme.linear, bias=qkv_bias == "fused")

        def vector(exists: bool) -> nn.Parameter | None:
            return nn.Parameter(nn.init.zeros_(torch.empty(width))) if exists else None

        self.q_bias = vector(qkv_bias in ("qv", "qkv"))
        self.k_bias = vector(qkv_bias == "qkv")
        self.v_bias = vector(qkv_bias in ("qv", "qkv"))
        self.relative_position_bias_table = None
        if table_rows:
            self.relative_position_bias_table = nn.Parameter(torch.empty(table_rows, num_heads))
            fill(self.relative_position_bias_table, scheme.table)
        self.proj = Linear(width, width, draw=end)

    def forward(
        self, x: Tensor, table: Tensor | None, grid: tuple[int, int], window: int = 0
    ) -> Tensor:
        """Maps (B, N, C) to the same shape.

        Args:
            x: (B, N, C), the tokens.
            table: Table of relative positions of R offsets, (R, h) float32; or the position biases
                of each image, (B, h, N, N); or None. R is (2H - 1)(2W - 1) for a grid (H, W), plus
                3 if there are prefix tokens or registers; with windows R is (2 window - 1)^2. The
                argument is not used if the block has its own table.
            grid: Rows and columns of the patches.
            window: Side in tokens of the windows within which patches attend, without prefix
                tokens; 0 means that every token attends to all tokens.
        """
        projected = added = None
        if self.k_bias is not None:
            projected = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        elif self.q_bias is not None:
            added = torch.stack([self.q_bias, self.v_bias])
        if self.relative_position_bias_table is not None:
            table = _float32(self.relative_position_bias_table)
        options = {
            "num_heads": self.num_heads,
            "scale": (x.shape[-1] // self.num_heads) ** -0.5,
            "bias": added,
            "table": table,
            "memory": self.memory,
        }
        qkv = self.qkv(x, projected)
        if table is not None and table.ndim == 4:
            if added is not None:
                qkv = (qkv + torch.cat([added[0], torch.zeros_like(added[0]), added[1]])).to(qkv)
            q, k, v = rearrange(qkv, "b n (s h d) -> s b h n d", s=3, h=self.num_heads)
            out = F.scaled_dot_product_attention(q, k, v, table.to(q), scale=options["scale"])
            return self.proj(rearrange(out, "b h n d -> b n (h d)"))
        if window:
            on_grid = qkv.unflatten(1, grid)
            out = window_attention(on_grid, window=window, shift=0, cosine=False, **options)
            return self.proj(out.flatten(1, 2))
        return self.proj(image_attention(qkv, grid=grid, **options))

    def attention_maps(
        self, x: Tensor, table: Tensor | None, grid: tuple[int, int], window: int = 0
    ) -> tuple[Tensor, TokenPositions]:
        """Returns the attention maps, (B, nW, h, T, T) float32, and the positions of their tokens.

        The nW windows have T tokens each; without windows, nW is 1 and T is N.

        Args:
            x: (B, N, C), the input of `forward`.
            table: Table of relative positions, (R, h), or None; not used if the block has its own
                table.
            grid: Rows and columns of the patches.
            window: Side of the windows in tokens; 0 means no windows.
        """
        if self.relative_position_bias_table is not None:
            table = self.relative_position_bias_table
        if window:
            positions = window_positions(grid, (window, window), (0, 0), pad_first=True)
        else:
            positions = image_positions(grid, x.shape[1] - grid[0] * grid[1])
        maps = attention_maps(
            with_query_bias(self.qkv(x), self.q_bias),
            positions,
            num_heads=self.num_heads,
            scale=(x.shape[-1] // self.num_heads) ** -0.5,
            cosine=False,
            table=table,
        )
        return maps, positions


def _at(
    places: Tensor, x: Tensor, table: Tensor | None, grid: Grid
) -> tuple[Tensor, Tensor | None]:
    """Selects some patches of each image, and looks up the position biases between the tokens.

    Args:
        places: (B, V) int64, numbers of the patches to select.
        x: (B, P + N, C), P prefix tokens and registers, then all patches.
        table: (R, h) float32, the shared position table, or None.
        grid: Rows and columns of the patches.

    Returns: the P tokens and the selected patches, (B, P + V, C); and the position biases,
        (B, h, P + V, P + V), or None without a table.
    """
    prefix = x.shape[1] - grid[0] * grid[1]
    first = torch.arange(prefix, device=x.device).expand(len(x), -1)
    numbers = torch.cat([first, places + prefix], dim=1)
    x = x.gather(1, numbers[..., None].expand(-1, -1, x.shape[-1]))
    if table is not None:
        pairs = position_index(*grid, prefix, x.device)[numbers[:, :, None], numbers[:, None, :]]
        # An embedding lookup, because its backward is deterministic on GPUs too.
        table = F.embedding(pairs, table).permute(0, 3, 1, 2).contiguous()
    return x, table


class RelativePositionBias(nn.Module):
    """A table of relative positions shared by all blocks."""

    def __init__(self, rows: int, num_heads: int, draw: Draw):
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads))
        fill(self.relative_position_bias_table, draw)

    def forward(self) -> Tensor:
        """Returns the table, (R, h) float32, for h heads and R offsets, prefix tokens last."""
        # A copy: under ZeRO-3 the parameter itself is empty again once this forward is over.
        return _float32(self.relative_position_bias_table).clone()


def _float32(table: Tensor) -> Tensor:
    return table.to(torch.promote_types(table.dtype, torch.float32))


def build(a: ViTArchitecture, options: Options) -> ViT:
    """Builds the model `a` with newly drawn weights."""
    arguments = {name: value for name, value in vars(a).items() if name not in _POSITIONAL}
    arguments["resizes_positions"] = options.resizes_positions
    return ViT(a.embed_dim, a.depths[0], a.num_heads[0], **arguments, **options.of_all())

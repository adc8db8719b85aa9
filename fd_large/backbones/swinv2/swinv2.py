"""Swin Transformer V2 as a student or teacher, with optional extra norms and shared position bias.

Blocks are post-norm. Attention uses the cosine of query and key with a learned scale, and adds a
position bias that an MLP computes from log-spaced coordinates. Parameter names are those of the
Swin-Transformer repository; an extra norm is `extra_norm` of its block, and a shared position bias
is `position_bias` of its stage.

Source: Liu et al., arXiv 2111.09883, and the code of Swin-Transformer and Feature-Distillation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fd_large.backbones.attention_maps import attention_maps, with_query_bias
from fd_large.backbones.family import Options
from fd_large.backbones.hierarchical import HierarchicalBackbone, PatchMerging, SizeRule, Stage
from fd_large.backbones.initialization import (
    NONE,
    NORMAL,
    OFFICIAL,
    ZEROS,
    Draw,
    Initialization,
    Scheme,
    scheme,
)
from fd_large.backbones.layers import (
    BranchEnd,
    Float32Linear,
    LayerNorm,
    Linear,
    Mlp,
    ResidualNorm,
)
from fd_large.backbones.swinv2.architecture import SwinV2Architecture
from fd_large.backbones.token_positions import TokenPositions, positions_in
from fd_large.backbones.windows import StageWindows, WindowRule, Windows, coordinate_table
from fd_large.kernels.window_attention import window_attention
from fd_large.kernels.window_attention_reference import Memory

_CPB_HIDDEN = 512
# Number of tables that a frozen MLP remembers: as many as there are sizes of maps.
_MOST_TABLES = 16
_MAX_LOG_SCALE = math.log(100)
_SCHEMES = {
    "fd": Scheme(NORMAL, NORMAL, ZEROS, NORMAL, NORMAL, True, 1e-5),
    "official": OFFICIAL,
    "none": NONE,
}


class SwinV2(HierarchicalBackbone):
    """SwinV2 backbone.

    Arguments with the names of fields of `SwinV2Architecture` and `Options` have the same meaning,
    except `qkv_bias`, which says whether query and value have a bias (the key never has).

    Args:
        in_chans: Channels of the images.
        image_size: Side or (height, width) in pixels of the images for which absolute positions are
            made; may be None if the model has no absolute positions.
        pretrained_window_sizes: As in `SwinV2Architecture`; None means that every stage scales
            coordinates by the side of the window that is in use.

    Raises: ConfigError: for values that do not fit each other.
    """

    in_two_dtypes = True

    def __init__(
        self,
        embed_dim: int,
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        *,
        window_size: int,
        patch_size: int = 4,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        patch_norm: bool = True,
        absolute_position: bool = False,
        image_size: int | tuple[int, int] | None = None,
        pretrained_window_sizes: tuple[int, ...] | None = None,
        extra_norm_every: int = 0,
        shared_position_bias: bool = False,
        drop_path_rate: float = 0.0,
        size_rule: SizeRule = "drop",
        window_rule: WindowRule = "masked",
        shift_stages: tuple[bool, ...] = (),
        stage_windows: tuple[int, ...] = (),
        attention_memory: Memory = "keep",
        sequential_stages: int = 0,
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
            stage_windows=stage_windows,
        )
        pretrained = tuple(pretrained_window_sizes or (0,) * len(depths))
        initial = scheme(_SCHEMES, initialization)

        def stage(s: int) -> SwinV2Stage:
            width, memory = embed_dim * 2**s, attention_memory
            # Blocks first: random weights are drawn in the order of construction.
            blocks = [
                Block(
                    width,
                    num_heads[s],
                    index=i,
                    number=sum(depths[:s]) + i + 1,
                    windows=self.stage_windows[s],
                    pretrained_window=pretrained[s],
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    extra_norm=extra_norm_every > 0 and (i + 1) % extra_norm_every == 0,
                    own_position_bias=not shared_position_bias,
                    attention_memory="sequential" if s < sequential_stages else memory,
                    norm_eps=norm_eps,
                    scheme=initial,
                )
                for i in range(depths[s])
            ]
            last = s + 1 == len(depths)
            downsample = None if last else Downsample(width, norm_eps, initial)
            bias = PositionBias(num_heads[s], initial) if shared_position_bias else None
            return SwinV2Stage(blocks, downsample, bias, self.stage_windows[s], pretrained[s])

        self._build(
            stage,
            in_chans=in_chans,
            scheme=initial,
            patch_norm=patch_norm,
            norm_eps=norm_eps,
            absolute_position=absolute_position,
            image_size=image_size,
        )

    def outside_blocks(self) -> list[nn.Module]:
        """Returns the position-bias MLPs of the blocks, which the stages call before the blocks."""
        tables = (block.attn.cpb_mlp for block in self.blocks())
        return [table for table in tables if table is not None]


class SwinV2Stage(Stage):
    """A stage that computes its blocks' position biases, by an MLP per block or one shared MLP."""

    def __init__(
        self,
        blocks: list[nn.Module],
        downsample: nn.Module | None,
        position_bias: PositionBias | None,
        windows: StageWindows,
        pretrained_window: int,
    ):
        super().__init__(blocks, downsample)
        self.position_bias = position_bias
        self.windows, self.pretrained_window = windows, pretrained_window

    def forward(
        self, stream: tuple[Tensor, Tensor], scales: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Runs the blocks on the residual stream, a pair of (B, H, W, C), and returns such a pair.

        Args:
            stream: The residual stream in its own dtype and in the dtype of the weights.
            scales: (2 * depth, B) float32, drop path's factors; None without drop path.
        """
        x, narrow = stream
        window = self.windows.over(*x.shape[1:3], 0).side
        where = (window, self.pretrained_window, x.device)
        shared = None if self.position_bias is None else self.position_bias(*where)
        for i, block in enumerate(self.blocks):
            # Outside of the blocks, whose activation checkpoints would compute the table again.
            table = block.attn.cpb_mlp.table(*where) if shared is None else shared
            sites = None if scales is None else scales[2 * i : 2 * i + 2]
            x, narrow = block(x, narrow, sites, table)
        return x, narrow


class Block(nn.Module):
    """Post-norm block: x + norm1(attention(x)), then x + norm2(mlp(x)), then maybe an extra norm.

    Args:
        width: Number of channels, C.
        num_heads: Number of heads, h.
        index: Number of the block in its stage, from 0; odd blocks shift their windows.
        windows: Windows of the stage.
        number: Number of the block in the model, from 1. The larger the number, the smaller are the
            initial last weights of the two branches.
        extra_norm: Whether the block ends with a norm on the main path.
        own_position_bias: Whether the block owns a position-bias MLP.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        index: int,
        number: int,
        windows: StageWindows,
        pretrained_window: int,
        mlp_ratio: float,
        qkv_bias: bool,
        extra_norm: bool,
        own_position_bias: bool,
        attention_memory: Memory,
        norm_eps: float,
        scheme: Scheme,
    ):
        super().__init__()
        # Only the parity, which decides the windows: torch.compile makes a graph for each value.
        self.parity, self.windows = index % 2, windows
        end = scheme.branch_end(2 * number)
        self.attn = CosineAttention(
            width,
            num_heads,
            pretrained_window=pretrained_window,
            qkv_bias=qkv_bias,
            own_position_bias=own_position_bias,
            memory=attention_memory,
            scheme=scheme,
            end=end,
        )
        self.norm1 = ResidualNorm(width, norm_eps, initial_weight=scheme.post_norm_weight)
        self.mlp = Mlp(width, int(width * mlp_ratio), draw=scheme.linear, end=end, last=BranchEnd)
        self.norm2 = ResidualNorm(width, norm_eps, initial_weight=scheme.post_norm_weight)
        self.extra_norm = LayerNorm(width, norm_eps) if extra_norm else None

    def forward(
        self, x: Tensor, narrow: Tensor, scales: Tensor | None, position_table: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the new residual stream twice: in the dtype of `x`, and in the dtype of `narrow`.

        Args:
            x: (B, H, W, C), the residual stream.
            narrow: The residual stream in the dtype of the weights.
            scales: (2, B) float32, drop path's factors of attention and MLP; None without drop
                path.
            position_table: ((2w - 1)^2, h) float32, the position biases of the block or its stage.
        """
        windows = self.windows.over(*x.shape[1:3], self.parity)
        first, second = (None, None) if scales is None else scales
        branch = self.attn(narrow, windows, position_table)
        x, narrow = self.norm1(x, branch, first, narrow.dtype)
        branch = self.mlp(narrow)
        if self.extra_norm is None:
            return self.norm2(x, branch, second, narrow.dtype)
        x, _ = self.norm2(x, branch, second, None)
        return self.extra_norm(x, x.dtype, narrow.dtype)


class CosineAttention(nn.Module):
    """Attention in a window: logits = scale * cos(q, k) + position bias."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        pretrained_window: int,
        qkv_bias: bool,
        own_position_bias: bool,
        memory: Memory,
        scheme: Scheme,
        end: Draw,
    ):
        super().__init__()
        self.num_heads, self.pretrained_window, self.memory = num_heads, pretrained_window, memory
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1))
        nn.init.constant_(self.logit_scale, math.log(10))
        self.cpb_mlp = PositionMlp(num_heads, scheme) if own_position_bias else None
        self.qkv = Linear(width, 3 * width, draw=scheme.linear, bias=False)
        self.q_bias = self.v_bias = None
        if qkv_bias:
            self.q_bias, self.v_bias = (nn.Parameter(torch.empty(width)) for _ in range(2))
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.v_bias)
        self.proj = BranchEnd(width, width, draw=end)

    def forward(
        self, x: Tensor, windows: Windows, position_table: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Maps tokens (B, H, W, C) to the same shape by attention within windows.

        Args:
            x: (B, H, W, C), the tokens.
            windows: Windows over the map, with side w.
            position_table: ((2w - 1)^2, h) float32, the position bias of each offset and head.

        Returns: the mapped tokens, and the bias (C,) of the last layer that is still to be added to
            them; None if this bias is already added.
        """
        bias = None if self.q_bias is None else torch.stack([self.q_bias, self.v_bias])
        wide = torch.promote_types(self.logit_scale.dtype, torch.float32)
        out = window_attention(
            self.qkv(windows.pad(x)),
            num_heads=self.num_heads,
            window=windows.side,
            shift=windows.shift,
            scale=self.logit_scale.to(wide).clamp(max=_MAX_LOG_SCALE).exp().flatten(),
            cosine=True,
            bias=bias,
            table=position_table,
            memory=self.memory,
        )
        return self.proj(windows.crop(out))

    def attention_maps(
        self, x: Tensor, windows: Windows, position_table: Tensor
    ) -> tuple[Tensor, TokenPositions]:
        """Returns the attention maps of a map cut into windows, and the positions of their tokens.

        Args:
            x: (B, H, W, C), the input of `forward`.
            windows: Windows over the map, with side w.
            position_table: ((2w - 1)^2, h) float32, the position bias of each offset and head.

        Returns: the maps, (B, nW, h, T, T) float32, for nW windows of T = w^2 tokens; and the
            positions of the windows' tokens in the image.
        """
        padded = windows.pad(x)
        maps = attention_maps(
            with_query_bias(self.qkv(padded).flatten(1, 2), self.q_bias),
            positions_in(padded, windows),
            num_heads=self.num_heads,
            scale=self.logit_scale.float().clamp(max=math.log(100)).exp(),  # (h, 1, 1)
            cosine=True,
            table=position_table,
            shift=windows.shift,
        )
        return maps, positions_in(x, windows)


class PositionMlp(nn.Sequential):
    """MLP that maps log-spaced offsets (R, 2) to position biases (R, h).

    If the MLP is frozen, `table` caches its results.
    """

    def __init__(self, num_heads: int, scheme: Scheme):
        super().__init__(
            Float32Linear(2, _CPB_HIDDEN, draw=scheme.linear),
            nn.ReLU(),
            Float32Linear(_CPB_HIDDEN, num_heads, draw=scheme.linear, bias=False),
        )
        self._tables: dict[tuple, Tensor] = {}

    def table(self, window: int, pretrained_window: int, device: torch.device) -> Tensor:
        """Returns the position bias of every offset in a window, ((2w - 1)^2, h) float32.

        Args:
            window: w, the side of the window in tokens.
            pretrained_window: Side in tokens of the window in pre-training, by which coordinates
                are scaled; 0 means `window`.
            device: Device of the result.
        """
        # Under ZeRO-3 (whose parameters have a number) modules must be called in the same order in
        # every step. Versions count changes in place, so other weights make other tables.
        frozen = not any(p.requires_grad or hasattr(p, "ds_id") for p in self.parameters())
        versions = [(p._version, p.dtype) for p in self.parameters()] if frozen else ()
        key = (window, pretrained_window, device, *versions)
        if frozen and key in self._tables:
            return self._tables[key]
        table = 16 * torch.sigmoid(self(coordinate_table(window, pretrained_window, device)))
        if frozen and not torch.is_inference(table):
            if len(self._tables) == _MOST_TABLES:
                self._tables.clear()
            self._tables[key] = table
        return table


class PositionBias(nn.Module):
    """A position-bias MLP shared by the blocks of a stage."""

    def __init__(self, num_heads: int, scheme: Scheme):
        super().__init__()
        self.cpb_mlp = PositionMlp(num_heads, scheme)

    def forward(self, window: int, pretrained_window: int, device: torch.device) -> Tensor:
        """Returns the position bias of every offset in a window, ((2w - 1)^2, h) float32.

        Args:
            window: w, the side of the window in tokens.
            pretrained_window: Side in tokens of the window in pre-training, by which coordinates
                are scaled; 0 means `window`.
            device: Device of the result.
        """
        return self.cpb_mlp.table(window, pretrained_window, device)


class Downsample(PatchMerging):
    """Patch merging of SwinV2: the linear reduction of 2x2 concatenated tokens, then a norm."""

    def __init__(self, width: int, norm_eps: float, scheme: Scheme):
        super().__init__()
        self.reduction = Linear(4 * width, 2 * width, draw=scheme.linear, bias=False)
        self.norm = LayerNorm(2 * width, norm_eps)

    def forward(self, stream: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Maps the residual stream from (B, H, W, C) to (B, ceil(H/2), ceil(W/2), 2C).

        Both `stream` and the result are pairs of tensors with equal values: the first is in the
        dtype of the residual stream, the second in the dtype of the weights.
        """
        x, narrow = stream
        return self.norm(self.reduction(super().forward(narrow)), x.dtype, narrow.dtype)


def build(a: SwinV2Architecture, options: Options) -> SwinV2:
    """Builds the model `a` with newly drawn weights."""
    arguments = vars(a) | {"qkv_bias": a.qkv_bias != "none", **options.of_windows()}
    return SwinV2(**arguments, sequential_stages=options.sequential_stages, **options.of_all())

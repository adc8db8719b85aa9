"""Heads that read whole maps: MLPs on all blocks, convolutions, and MLPs with another grid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.initialization import NORMAL
from fd_large.backbones.layers import Linear
from fd_large.errors import ConfigError
from fd_large.tasks.distillation.alignment import Grid
from fd_large.tasks.distillation.heads.map_head import (
    WHERE,
    MapHead,
    MapShapes,
    grids_named,
    patches_of,
)
from fd_large.tasks.distillation.heads.token_heads import MLP


class Ladder(MapHead):
    """Sum over the student's blocks of an MLP on each block's map.

    Each block has an MLP for the patches and another for the CLS token. Registers are left out.
    Source: Sariyildiz et al. (UNIC), arXiv 2408.05088; sizes as in its code.

    Args:
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's tokens.
        maps: Grids of student and teacher, prefix tokens, and the number of blocks.
        hidden: Hidden channels of the MLPs; None for the student's channels (768 in UNIC).
        last_hidden: Hidden channels of the last block's MLP; None for four times the student's
            channels (3072 in UNIC).
        blocks: Numbers of the blocks that are read, counted from 0; None for all blocks.
        pre_norm: Whether each MLP begins with a layer norm.
        mid_norm: Whether each MLP has a layer norm before its GELU.
    """

    reads_blocks = True

    def __init__(
        self,
        width: int,
        teacher_width: int,
        maps: MapShapes,
        *,
        hidden: int | None = None,
        last_hidden: int | None = None,
        blocks: Sequence[int] | None = None,
        pre_norm: bool = False,
        mid_norm: bool = False,
    ) -> None:
        super().__init__(maps.student_grid, min(maps.num_prefix_tokens, 1))
        last = maps.num_blocks - 1
        self.numbers = tuple(range(maps.num_blocks) if blocks is None else blocks)
        sizes = {
            number: (last_hidden or 4 * width) if number == last else (hidden or width)
            for number in self.numbers
        }

        def rungs() -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    str(number): _mlp(width, size, teacher_width, pre_norm, mid_norm)
                    for number, size in sizes.items()
                }
            )

        self.cls = rungs() if self.num_prefix_tokens else None
        self.patch = rungs()

    def grid_from(self, student: Grid) -> Grid:
        """Returns `student`, the student's grid, which is also the grid of the output."""
        return student

    def forward(self, student: tuple[FeatureMap, ...]) -> FeatureMap:
        """Returns a map with the CLS token, if the student has one, and the patches.

        Args:
            student: The maps after the student's blocks.
        """
        parts = [self._sum(self.patch, [patches_of(map_) for map_ in student])]
        if self.cls is not None:
            parts.insert(0, self._sum(self.cls, [map_.tokens[:, :1] for map_ in student]))
        tokens = torch.cat(parts, dim=1)
        return FeatureMap(tokens, student[0].grid, self.num_prefix_tokens)

    def _sum(self, rungs: nn.ModuleDict, tokens: list[Tensor]) -> Tensor:
        """Returns the sum of the MLPs' outputs, (B, N, teacher_width).

        Args:
            rungs: MLPs by the number of their block.
            tokens: For each block of the student, the tokens after the block, (B, N, width).
        """
        total = rungs[str(self.numbers[0])](tokens[self.numbers[0]])
        for number in self.numbers[1:]:
            total = total + rungs[str(number)](tokens[number])
        return total


def _mlp(width: int, hidden: int, out_width: int, pre_norm: bool, mid_norm: bool) -> nn.Sequential:
    """Returns two linear layers with GELU between them.

    Args:
        width, hidden, out_width: Channels before, between and after the layers.
        pre_norm: Whether a layer norm comes first.
        mid_norm: Whether a layer norm comes before the GELU.
    """
    layers: list[nn.Module] = [nn.LayerNorm(width)] if pre_norm else []
    layers.append(Linear(width, hidden, draw=NORMAL))
    layers += [nn.LayerNorm(hidden)] if mid_norm else []
    layers += [nn.GELU(), Linear(hidden, out_width, draw=NORMAL)]
    return nn.Sequential(*layers)


class Convolutional(MapHead):
    """Two convolutions with norms and ReLU, and a last layer, between two square grids.

    Each norm is a layer norm over a whole map, with a factor for each channel and position.
    Therefore a head works for a single pair of grids alone. Source: Shang et al. (Theia), arXiv
    2407.20179, whose translators are made for grids of side 14, 16 and 64.

    The teacher's grid must have the side n, n + 2, 4 n, 4 (n + 2), n / 2 or n / 4, where n is the
    side of the student's grid. For n + 2 and 4 (n + 2) a transposed convolution first adds a border
    of one patch. For n / 2 there is one convolution instead of two.

    Args:
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's tokens.
        maps: Grids of student and teacher, both square.
        hidden: Hidden channels; None for as many as the convolutions' input has.
        adapted: Output channels of a layer norm and linear layer before the convolutions; 0 to
            leave these out.
        last_side: Side of the last convolution's kernel; 1 for a linear layer.

    Raises: ConfigError: if a grid is not square, or if the teacher's grid has none of these sides.
    """

    def __init__(
        self,
        width: int,
        teacher_width: int,
        maps: MapShapes,
        *,
        hidden: int | None = None,
        adapted: int = 0,
        last_side: int = 1,
    ) -> None:
        super().__init__(maps.teacher_grid)
        (side, columns), (teacher_side, teacher_columns) = maps.student_grid, maps.teacher_grid
        self.first = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, adapted)) if adapted else None
        )
        width = adapted or width
        padded = side + 2 if teacher_side in (side + 2, 4 * (side + 2)) else side
        fits = teacher_side in (padded, 4 * padded) or side in (2 * teacher_side, 4 * teacher_side)
        if not fits or (side, teacher_side) != (columns, teacher_columns):
            raise ConfigError(
                f"{WHERE}: convolutions do not lead from the student's grid to the teacher's; got "
                f"{grids_named(maps)}, expected square grids of n and n, n + 2, 4n, 4(n + 2), "
                "n / 2 or n / 4 a side. Set teacher_image_size, or use another head."
            )
        self.pad = nn.ConvTranspose2d(width, width, 3) if padded != side else None
        hidden = hidden or width
        sides, convolutions = _convolutions(padded, teacher_side, width, hidden)
        layers: list[nn.Module] = [nn.LayerNorm([width, padded, padded])]
        for out_side, convolution in zip(sides, convolutions, strict=True):
            layers += [convolution, nn.ReLU(), nn.LayerNorm([hidden, out_side, out_side])]
        self.layers = nn.Sequential(*layers)
        make_last = nn.ConvTranspose2d if teacher_side > padded else nn.Conv2d
        self.last = (
            nn.Linear(hidden, teacher_width)
            if last_side == 1
            else make_last(hidden, teacher_width, last_side, padding=last_side // 2)
        )

    def forward(self, student: FeatureMap) -> FeatureMap:
        """Returns a map of patches on the teacher's grid.

        Args:
            student: The student's map; its prefix tokens are left out.
        """
        tokens = patches_of(student)
        if self.first is not None:
            tokens = self.first(tokens)
        map_ = tokens.transpose(1, 2).unflatten(2, student.grid)
        if self.pad is not None:
            map_ = self.pad(map_)
        map_ = self.layers(map_)
        if isinstance(self.last, nn.Linear):
            return FeatureMap(self.last(_tokens(map_)), self.grid, 0)
        return FeatureMap(_tokens(self.last(map_)), self.grid, 0)


def _tokens(map_: Tensor) -> Tensor:
    """Returns the tokens, (B, H * W, C), of the image-like map `map_`, (B, C, H, W)."""
    return map_.flatten(2).transpose(1, 2)


def _convolutions(
    side: int, out_side: int, width: int, hidden: int
) -> tuple[list[int], list[nn.Module]]:
    """Makes the convolutions that lead from one square grid to another.

    Args:
        side: Side of the input's grid.
        out_side: Side of the output's grid: `side`, 4 * side, side / 2 or side / 4.
        width: Channels of the input.
        hidden: Channels of the output of each convolution.

    Returns: the side of the grid after each convolution, and the convolutions.
    """
    if out_side == 4 * side:
        return [2 * side - 1, out_side], [
            nn.ConvTranspose2d(width, hidden, 3, stride=2, padding=1),
            nn.ConvTranspose2d(hidden, hidden, 3, stride=2, output_padding=1),
        ]
    if side == 2 * out_side:
        return [out_side], [nn.Conv2d(width, hidden, 4, stride=2, padding=1)]
    stride = 1 if out_side == side else 2
    return [side // stride, out_side], [
        nn.Conv2d(channels, hidden, 3, stride=stride, padding=1) for channels in (width, hidden)
    ]


class ResizedMLP(MapHead):
    """A norm and a linear layer, nearest-neighbour resizing to the teacher's grid, and a ReLU MLP.

    Source: the translator `mlp` of Shang et al. (Theia), arXiv 2407.20179. There all teachers share
    the first norm and linear layer; here each teacher has its own.

    Args:
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's tokens.
        maps: Grids of student and teacher.
        hidden: Output channels of the first linear layer; the hidden layers of the MLP have twice
            as many.
        layers: Number of linear layers of the MLP, at least one.
    """

    def __init__(
        self,
        width: int,
        teacher_width: int,
        maps: MapShapes,
        *,
        hidden: int = 1024,
        layers: int = 3,
    ) -> None:
        super().__init__(maps.teacher_grid)
        self.first = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        channels = [hidden, *[2 * hidden] * (layers - 1)]
        inner: list[nn.Module] = []
        for before, after in pairwise(channels):
            inner += [nn.Linear(before, after), nn.ReLU()]
        self.mlp = nn.Sequential(*inner, nn.Linear(channels[-1], teacher_width))

    def forward(self, student: FeatureMap) -> FeatureMap:
        """Returns a map of patches on the teacher's grid.

        Args:
            student: The student's map; its prefix tokens are left out.
        """
        tokens = self.first(patches_of(student))
        if student.grid != self.grid:
            map_ = F.interpolate(tokens.transpose(1, 2).unflatten(2, student.grid), self.grid)
            tokens = map_.flatten(2).transpose(1, 2)
        return FeatureMap(self.mlp(tokens), self.grid, 0)


class UpsamplingMLP(MapHead):
    """An `MLP` that predicts several patches of the teacher's map from each patch of the student.

    Each patch of the student predicts factor x factor patches, where the teacher's grid has
    `factor` times as many rows and columns as the student's grid.

    Source: the option `fd_upsample_factor` of RADIO's heads (arXiv 2312.06709, in its code).

    Args:
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's tokens.
        maps: Grids of student and teacher, which decide the factor.
        hidden: See `MLP`.
        inner: See `MLP`.
        pre_norm: See `MLP`.

    Raises: ConfigError: if the teacher's grid is no multiple of the student's grid.
    """

    def __init__(
        self,
        width: int,
        teacher_width: int,
        maps: MapShapes,
        *,
        hidden: int | None = None,
        inner: int = 0,
        pre_norm: bool = False,
    ) -> None:
        super().__init__(maps.teacher_grid)
        self.factor = max(1, maps.teacher_grid[0] // maps.student_grid[0])
        if tuple(self.factor * side for side in maps.student_grid) != maps.teacher_grid:
            raise ConfigError(
                f"{WHERE}: the teacher's grid is not a multiple of the student's; got "
                f"{grids_named(maps)}, expected a multiple, such as 28x28 for a student's 14x14. "
                "Set teacher_image_size, or use another head."
            )
        self.mlp = MLP(
            width,
            self.factor**2 * teacher_width,
            hidden=hidden,
            inner=inner,
            pre_norm=pre_norm,
        )

    def grid_from(self, student: Grid) -> Grid:
        """Returns `factor` times the rows and columns of `student`, the student's grid."""
        return self.factor * student[0], self.factor * student[1]

    def forward(self, student: FeatureMap) -> FeatureMap:
        """Returns a map of patches with `factor` times the rows and columns of the student's map.

        Args:
            student: The student's map; its prefix tokens are left out.
        """
        (rows, columns), u = student.grid, self.factor
        tokens = rearrange(
            self.mlp(patches_of(student)),
            "b (h w) (i j c) -> b (h i w j) c",
            h=rows,
            w=columns,
            i=u,
            j=u,
        )
        return FeatureMap(tokens, self.grid_from(student.grid), 0)

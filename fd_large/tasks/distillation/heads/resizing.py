"""MLPs that lead to the teacher's grid: the student's map resized, or several places from one."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from einops import rearrange
from torch import nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.errors import ConfigError
from fd_large.tasks.distillation.alignment import Grid
from fd_large.tasks.distillation.heads.map_head import (
    WHERE,
    MapHead,
    Maps,
    grids_named,
    patches_of,
)
from fd_large.tasks.distillation.heads.token_heads import MLP


class ResizedMLP(MapHead):
    """A norm and a linear layer, the nearest place of each of the teacher's, and an MLP with ReLU.

    Source: Shang et al. (Theia), arXiv 2407.20179, the translator `mlp`, whose first two layers
    serve all teachers; here each teacher has its own.

    Args:
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's.
        maps: Their grids.
        hidden: Channels of the first linear layer; the MLP has twice as many.
        layers: Linear layers of the MLP, at least one.
    """

    def __init__(
        self, width: int, teacher_width: int, maps: Maps, *, hidden: int = 1024, layers: int = 3
    ) -> None:
        super().__init__(maps.teacher_grid)
        self.first = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden))
        channels = [hidden, *[2 * hidden] * (layers - 1)]
        inner: list[nn.Module] = []
        for before, after in pairwise(channels):
            inner += [nn.Linear(before, after), nn.ReLU()]
        self.mlp = nn.Sequential(*inner, nn.Linear(channels[-1], teacher_width))

    def forward(self, student: FeatureMap) -> FeatureMap:
        """Returns patches on the teacher's grid.

        Args:
            student: The student's map; its prefix tokens are left out.
        """
        tokens = self.first(patches_of(student))
        if student.grid != self.grid:
            map_ = F.interpolate(tokens.transpose(1, 2).unflatten(2, student.grid), self.grid)
            tokens = map_.flatten(2).transpose(1, 2)
        return FeatureMap(self.mlp(tokens), self.grid, 0)


class UpsamplingMLP(MapHead):
    """An `MLP` that gives u x u places of the teacher's map for each of the student's.

    Source: the option `fd_upsample_factor` of RADIO's heads (arXiv 2312.06709, in its code).

    Args:
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's.
        maps: Their grids; the teacher's is a multiple u of the student's.
        hidden: See `MLP`.
        inner: See `MLP`.
        pre_norm: See `MLP`.

    Raises: ConfigError: if the teacher's grid is no such multiple.
    """

    def __init__(
        self,
        width: int,
        teacher_width: int,
        maps: Maps,
        *,
        hidden: int | None = None,
        inner: int = 0,
        pre_norm: bool = False,
    ) -> None:
        super().__init__(maps.teacher_grid)
        self.factor = max(1, maps.teacher_grid[0] // maps.student_grid[0])
        if tuple(self.factor * side for side in maps.student_grid) != maps.teacher_grid:
            raise ConfigError(
                f"{WHERE}: the teacher's grid is no multiple of the student's; got "
                f"{grids_named(maps)}, expected as 14x14 and 28x28. Set teacher_image_size, or "
                "take another head."
            )
        self.mlp = MLP(
            width,
            self.factor**2 * teacher_width,
            hidden=hidden,
            inner=inner,
            pre_norm=pre_norm,
        )

    def grid_from(self, student: Grid) -> Grid:
        """Returns a grid u times as fine as the student's."""
        return self.factor * student[0], self.factor * student[1]

    def forward(self, student: FeatureMap) -> FeatureMap:
        """Returns patches on the finer grid.

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

"""Convolutions from the student's grid to the teacher's, with norms over whole maps.

The norms have a factor for each channel and place, so that the head is made for one pair of grids;
the student itself is not. Source: Shang et al. (Theia), arXiv 2407.20179, whose translators are
made for grids of 14, 16 and 64 a side; here the same layers take any grids in those proportions.
"""

from __future__ import annotations

from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.errors import ConfigError
from fd_large.tasks.distillation.heads.map_head import (
    WHERE,
    MapHead,
    Maps,
    grids_named,
    patches_of,
)


class Convolutional(MapHead):
    """Two convolutions with norms and ReLU, and a last layer.

    They keep the grid, or make it four times as fine or a quarter as fine; before that, a
    transposed convolution adds a place on each border where the teacher's grid asks for it. One
    convolution alone halves the grid.

    Args:
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's.
        maps: Their grids, both square.
        hidden: Channels between; None: as many as the convolutions are given.
        adapted: Channels of a norm and a linear layer that come first; 0: there are none.
        last_side: Side of the last convolution; 1 is a linear layer.

    Raises: ConfigError: if the grids are in none of these proportions.
    """

    def __init__(
        self,
        width: int,
        teacher_width: int,
        maps: Maps,
        *,
        hidden: int | None = None,
        adapted: int = 0,
        last_side: int = 1,
    ) -> None:
        super().__init__(maps.teacher_grid)
        (side, columns), (wanted, wanted_columns) = maps.student_grid, maps.teacher_grid
        self.first = (
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, adapted)) if adapted else None
        )
        width = adapted or width
        padded = side + 2 if wanted in (side + 2, 4 * (side + 2)) else side
        fits = wanted in (padded, 4 * padded) or side in (2 * wanted, 4 * wanted)
        if not fits or (side, wanted) != (columns, wanted_columns):
            raise ConfigError(
                f"{WHERE}: convolutions do not lead from the student's grid to the teacher's; got "
                f"{grids_named(maps)}, expected square grids of n and n, n + 2, 4n, 4(n + 2), "
                "n / 2 or n / 4 a side. Set teacher_image_size, or take another head."
            )
        self.pad = nn.ConvTranspose2d(width, width, 3) if padded != side else None
        hidden = hidden or width
        sides, convolutions = _convolutions(padded, wanted, width, hidden)
        layers: list[nn.Module] = [nn.LayerNorm([width, padded, padded])]
        for out_side, convolution in zip(sides, convolutions, strict=True):
            layers += [convolution, nn.ReLU(), nn.LayerNorm([hidden, out_side, out_side])]
        self.layers = nn.Sequential(*layers)
        make_last = nn.ConvTranspose2d if wanted > padded else nn.Conv2d
        self.last = (
            nn.Linear(hidden, teacher_width)
            if last_side == 1
            else make_last(hidden, teacher_width, last_side, padding=last_side // 2)
        )

    def forward(self, student: FeatureMap) -> FeatureMap:
        """Returns patches on the teacher's grid.

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
    """(B, H * W, C) of a map (B, C, H, W)."""
    return map_.flatten(2).transpose(1, 2)


def _convolutions(
    side: int, wanted: int, width: int, hidden: int
) -> tuple[list[int], list[nn.Module]]:
    """The convolutions from one grid to another, and the side of each one's map."""
    if wanted == 4 * side:
        return [2 * side - 1, wanted], [
            nn.ConvTranspose2d(width, hidden, 3, stride=2, padding=1),
            nn.ConvTranspose2d(hidden, hidden, 3, stride=2, output_padding=1),
        ]
    if side == 2 * wanted:
        return [wanted], [nn.Conv2d(width, hidden, 4, stride=2, padding=1)]
    stride = 1 if wanted == side else 2
    return [side // stride, wanted], [
        nn.Conv2d(channels, hidden, 3, stride=stride, padding=1) for channels in (width, hidden)
    ]

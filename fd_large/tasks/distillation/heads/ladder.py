"""The ladder of projectors: an MLP on every block of the student, whose results are summed.

Source: Sariyildiz et al. (UNIC), arXiv 2408.05088; sizes as in its code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.initialization import NORMAL
from fd_large.backbones.layers import Linear
from fd_large.tasks.distillation.alignment import Grid
from fd_large.tasks.distillation.heads.map_head import MapHead, Maps, patches_of


class Ladder(MapHead):
    """One MLP for each block and each of CLS token and patches; registers are left out.

    Args:
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's.
        maps: Their grids, and the number of blocks.
        hidden: Hidden channels of the MLPs; None: as many as the student's, 768 in UNIC.
        last_hidden: Those of the last block's; None: four times as many, 3072 in UNIC.
        blocks: Numbers of the blocks that are read, counted from 0; None: all.
        pre_norm: Whether a norm stands before each MLP.
        mid_norm: Whether a norm stands before the GELU.
    """

    reads_blocks = True

    def __init__(
        self,
        width: int,
        teacher_width: int,
        maps: Maps,
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
        """Returns the student's grid."""
        return student

    def forward(self, student: tuple[FeatureMap, ...]) -> FeatureMap:
        """Returns CLS token, where the student has one, and patches.

        Args:
            student: The maps after the student's blocks.
        """
        parts = [self._sum(self.patch, [patches_of(map_) for map_ in student])]
        if self.cls is not None:
            parts.insert(0, self._sum(self.cls, [map_.tokens[:, :1] for map_ in student]))
        tokens = torch.cat(parts, dim=1)
        return FeatureMap(tokens, student[0].grid, self.num_prefix_tokens)

    def _sum(self, rungs: nn.ModuleDict, tokens: list[Tensor]) -> Tensor:
        total = rungs[str(self.numbers[0])](tokens[self.numbers[0]])
        for number in self.numbers[1:]:
            total = total + rungs[str(number)](tokens[number])
        return total


def _mlp(width: int, hidden: int, out_width: int, pre_norm: bool, mid_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = [nn.LayerNorm(width)] if pre_norm else []
    layers.append(Linear(width, hidden, draw=NORMAL))
    layers += [nn.LayerNorm(hidden)] if mid_norm else []
    layers += [nn.GELU(), Linear(hidden, out_width, draw=NORMAL)]
    return nn.Sequential(*layers)

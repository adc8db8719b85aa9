"""The contract of heads that read a student's map with its grid, or the maps of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fd_large import doors
from fd_large.backbones.feature_map import FeatureMap
from fd_large.errors import ConfigError
from fd_large.tasks.distillation.alignment import Grid
from fd_large.tasks.distillation.task import Seen

WHERE = "objective.head"


class MapShapes(NamedTuple):
    """Grids and prefix tokens for which a head is made, besides the two widths.

    Attributes:
        student_grid: Rows and columns of the student's map.
        teacher_grid: Rows and columns of the teacher's map.
        num_prefix_tokens: Tokens before the patches of the student's map, the first being CLS.
        num_blocks: Blocks of the student.
    """

    student_grid: Grid
    teacher_grid: Grid
    num_prefix_tokens: int
    num_blocks: int


class MapHead(nn.Module):
    """A head constructed from (width, teacher_width, maps) that returns a map on its own grid.

    Args:
        grid: Rows and columns of its output.
        num_prefix_tokens: Tokens before the patches in its output.

    Attributes:
        grid, num_prefix_tokens: See the arguments.
        reads_blocks: Whether `forward` takes a tuple of the maps after each block of the student,
            without a norm, instead of its last map.
    """

    reads_blocks: ClassVar[bool] = False

    def __init__(self, grid: Grid, num_prefix_tokens: int = 0) -> None:
        super().__init__()
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens

    def grid_from(self, student: Grid) -> Grid:
        """Returns the grid of the output: `grid`, unless the head takes maps of any grid.

        Args:
            student: Rows and columns of the student's map.
        """
        return self.grid

    def forward(self, student: Any) -> FeatureMap:
        """Returns a map of `teacher_width` channels.

        Args:
            student: The student's map, or the maps after its blocks.
        """
        raise NotImplementedError


def patches_of(map_: FeatureMap) -> Tensor:
    """Returns the tokens (B, H * W, C) of a map without the prefix."""
    return map_.tokens[:, map_.num_prefix_tokens :]


def with_blocks(
    student: nn.Module, run: Callable[[], FeatureMap]
) -> tuple[FeatureMap, tuple[FeatureMap, ...]]:
    """Returns a student's map and the maps after its blocks.

    Forward hooks on the blocks collect the maps, also from checkpointed, compiled and sharded
    blocks.

    Args:
        student: A backbone whose blocks all give tokens (B, N, C) of one shape.
        run: Runs its forward.

    Raises: ConfigError: if the blocks' maps are not of one shape.
    """
    heard: list[Any] = []
    with ExitStack() as hooks:
        for block in student.blocks():
            hook = block.register_forward_hook(lambda _m, _i, output: heard.append(output))
            hooks.callback(hook.remove)
        last = run()
    rows, columns = last.grid
    shapes = {tuple(getattr(output, "shape", ())) for output in heard}
    tokens = {shape[1] for shape in shapes if len(shape) == 3}
    if len(shapes) != 1 or not tokens or min(tokens) < rows * columns:
        raise ConfigError(
            f"{WHERE}: the head reads the maps of all blocks; got blocks with outputs "
            f"{sorted(shapes)}, expected tokens of one shape, as a ViT's. Take another head."
        )
    prefix = min(tokens) - rows * columns
    return last, tuple(FeatureMap(output, last.grid, prefix) for output in heard)


class HeardBlocks:
    """Wraps a sight (task.py) to collect the maps after the student's blocks too."""

    def __init__(self, sight: Any) -> None:
        self._sight = sight

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sight, name)

    def see(
        self,
        student: nn.Module,
        pixels: Tensor,
        keep: Tensor | None,
        drawn: Mapping[str, Tensor],
    ) -> Seen:
        """Runs the student."""
        run = partial(self._sight.see, student, pixels, keep, drawn)
        last, blocks = with_blocks(student, lambda: run().map)
        end = blocks[-1]._replace(tokens=BesideLoss.apply(blocks[-1].tokens, last.tokens))
        return Seen(last, (*blocks[:-1], end))


class BesideLoss(torch.autograd.Function):
    """Passes on a tensor unchanged, while its backward also sends zeros to an unrelated tensor.

    If heads read only blocks, the student's last map is in no loss. ZeRO-3's hooks need its
    gradient to gather the student's direct parameters (class token, positions).
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, beside: Tensor) -> Tensor:
        """Returns the tensor.

        Args:
            ctx: Keeps `beside` for the backward.
            tensor: Any tensor that a loss depends on.
            beside: Any tensor.
        """
        ctx.save_for_backward(beside)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the tensor's own gradient, and zeros."""
        (beside,) = ctx.saved_tensors
        return slopes[0], torch.zeros_like(beside)


def check_map_head(
    head: MapHead, name: str, student: FeatureMap, blocks: Sequence[FeatureMap], out_width: int
) -> None:
    """Runs a head that was built on the meta device.

    Args:
        head: The head.
        name: Its name in the recipe.
        student: The student's map, on the meta device.
        blocks: The maps after its blocks, if the head reads them.
        out_width: Channels that the head's output must have.

    Raises: ConfigError: if the head fails, or its output differs from its declared shape.
    """
    rows, columns = head.grid_from(student.grid)
    expected = (len(student.tokens), head.num_prefix_tokens + rows * columns, out_width)
    try:
        with torch.no_grad():
            out = head(tuple(blocks) if head.reads_blocks else student)
        got = str(tuple(out.tokens.shape))
    except Exception as error:  # The user's code may raise anything.
        got = doors.cause(error)
    if got != str(expected):
        raise ConfigError(
            f"{WHERE}: {name} does not fit; got {got}, expected {expected} for its grid of "
            f"{rows}x{columns}. Correct the head."
        )


def grids_named(maps: MapShapes) -> str:
    """Returns the two grids in words."""
    grids = (maps.student_grid, maps.teacher_grid)
    return " and ".join(f"{rows}x{columns}" for rows, columns in grids)

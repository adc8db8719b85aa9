"""The interface of heads that read a student's map with its grid, or the maps after its blocks."""

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
    """The shapes that the constructor of a `MapHead` gets besides the widths.

    Attributes:
        student_grid: Rows and columns of the student's map.
        teacher_grid: Rows and columns of the teacher's map.
        num_prefix_tokens: Number of tokens before the patches of the student's map; the first is
            CLS.
        num_blocks: Number of the student's blocks.
    """

    student_grid: Grid
    teacher_grid: Grid
    num_prefix_tokens: int
    num_blocks: int


class MapHead(nn.Module):
    """A head that reads whole maps, and whose output may have another grid than the student's map.

    Subclasses are constructed from (width, teacher_width, maps), where `maps` is a `MapShapes`.

    Args:
        grid: Rows and columns of the output.
        num_prefix_tokens: Number of tokens before the patches in the output.

    Attributes:
        grid, num_prefix_tokens: See the arguments.
        reads_blocks: Whether `forward` takes the maps after each block of the student, before any
            norm, as a tuple; if False, it takes the student's last map.
    """

    reads_blocks: ClassVar[bool] = False

    def __init__(self, grid: Grid, num_prefix_tokens: int = 0) -> None:
        super().__init__()
        self.grid, self.num_prefix_tokens = grid, num_prefix_tokens

    def grid_from(self, student: Grid) -> Grid:
        """Returns the rows and columns of the output; a head that accepts any grid overrides this.

        Args:
            student: Rows and columns of the student's map.
        """
        return self.grid

    def forward(self, student: Any) -> FeatureMap:
        """Returns a map of `teacher_width` channels.

        Args:
            student: The student's last map; or, if `reads_blocks`, a tuple of the maps after the
                student's blocks.
        """
        raise NotImplementedError


def patches_of(map_: FeatureMap) -> Tensor:
    """Returns the patches of `map_`, its tokens without the prefix tokens, (B, H * W, C)."""
    return map_.tokens[:, map_.num_prefix_tokens :]


def with_blocks(
    student: nn.Module, run: Callable[[], FeatureMap]
) -> tuple[FeatureMap, tuple[FeatureMap, ...]]:
    """Runs a student, and returns its last map and the maps after its blocks.

    Forward hooks on the blocks collect the maps. The hooks also work with activation checkpointing,
    compiled blocks and sharded blocks.

    Args:
        student: A backbone whose blocks all return tokens (B, N, C) of the same shape.
        run: Runs the student's forward.

    Raises: ConfigError: if the blocks' outputs differ in shape.
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
            f"{sorted(shapes)}, expected tokens of one shape, as a ViT's. Use another head."
        )
    prefix = min(tokens) - rows * columns
    return last, tuple(FeatureMap(output, last.grid, prefix) for output in heard)


class HeardBlocks:
    """Wraps `Distillation.sight`, to also collect the maps after the student's blocks.

    Args:
        sight: The wrapped object, whose other attributes the wrapper has too.
    """

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
        """Runs the student, and returns its last map and the maps after its blocks.

        Args:
            student: The student.
            pixels: (B, 3, H, W), normalised.
            keep: (num_sites, B) bool, or None for no drop path.
            drawn: The result of `draws` of the wrapped object.
        """
        run = partial(self._sight.see, student, pixels, keep, drawn)
        last, blocks = with_blocks(student, lambda: run().map)
        end = blocks[-1]._replace(tokens=BesideLoss.apply(blocks[-1].tokens, last.tokens))
        return Seen(last, (*blocks[:-1], end))


class BesideLoss(torch.autograd.Function):
    """Identity on a tensor, whose backward also gives another tensor a gradient of zeros.

    If the heads read only the blocks' maps, no loss depends on the student's last map. But ZeRO-3's
    hooks need a gradient of the last map, to all-gather the parameters that the student owns
    directly (class token, positions).
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, beside: Tensor) -> Tensor:
        """Returns a copy of the tensor.

        Args:
            ctx: Keeps `beside` for the backward.
            tensor: A tensor that a loss depends on.
            beside: The tensor whose gradient is zeros.
        """
        ctx.save_for_backward(beside)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (gradient for `tensor`, gradient for `beside`).

        The first is `slopes[0]`, the gradient of the output; the second is zeros.
        """
        (beside,) = ctx.saved_tensors
        return slopes[0], torch.zeros_like(beside)


def check_map_head(
    head: MapHead, name: str, student: FeatureMap, blocks: Sequence[FeatureMap], out_width: int
) -> None:
    """Runs a head on the meta device, and checks the shape of its output.

    Args:
        head: The head, built on the meta device.
        name: The head's name in the recipe.
        student: The student's map, on the meta device.
        blocks: The maps after the student's blocks; read only by a head that `reads_blocks`.
        out_width: Number of channels that the output must have.

    Raises:
        ConfigError: if the head fails, or if the output's shape is not the shape that the head's
            `grid_from` and `num_prefix_tokens` declare.
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
            f"{WHERE}: {name} does not fit; got {got}, expected {expected} for a grid of "
            f"{rows}x{columns}. Correct the head."
        )


def grids_named(maps: MapShapes) -> str:
    """Returns the grids of student and teacher in words, such as "14x14 and 16x16".

    Args:
        maps: The two grids, among other shapes.
    """
    grids = (maps.student_grid, maps.teacher_grid)
    return " and ".join(f"{rows}x{columns}" for rows, columns in grids)

"""The table of heads.

A new head needs a line in `HEADS`, or a file of the user's own (`objective.head
module:FILE.py:NAME`). It is a function or Module class of (width, teacher_width) that returns a
Module from tokens (B, N, width) to (B, N, teacher_width), or a `MapHead`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from fd_large import doors
from fd_large.engine.heads import Make, make_head
from fd_large.tasks.distillation.heads.map_head import WHERE, MapHead, MapShapes
from fd_large.tasks.distillation.heads.map_heads import (
    Convolutional,
    Ladder,
    ResizedMLP,
    UpsamplingMLP,
)
from fd_large.tasks.distillation.heads.token_heads import (
    MLP,
    attention_mlp,
    block,
    linear,
    mlp_relu,
)

HEADS: dict[str, Make] = {
    "linear": linear,
    "mlp": MLP,
    "mlp_relu": mlp_relu,
    "attention_mlp": attention_mlp,
    "block": block,
    "ladder": Ladder,
    "convolutional": Convolutional,
    "wide_convolutional": partial(Convolutional, adapted=1024, hidden=2048, last_side=3),
    "resized_mlp": ResizedMLP,
    "upsampling_mlp": UpsamplingMLP,
}
"""The built-in heads."""


def make(
    name: str, width: int, teacher_width: int, maps: Callable[[], MapShapes] | None
) -> nn.Module:
    """Returns the head that a recipe names.

    Args:
        name: A name in `HEADS`, or the user's own `module:FILE.py:NAME` (fd_large/doors.py).
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's tokens.
        maps: Returns the grids of student and teacher, for a head that reads maps.

    Raises: ConfigError: if the head does not exist or does not fit.
    """
    constructor = doors.load(name, kind="heads", where=WHERE, built_in=HEADS)
    arguments = [maps()] if maps is not None and reads_maps(constructor) else []
    return make_head(name, width, teacher_width, *arguments, built_in=HEADS, where=WHERE)


def reads_maps(make: Make) -> bool:
    """Returns whether a constructor of heads makes `MapHead`s."""
    constructor = make.func if isinstance(make, partial) else make
    return isinstance(constructor, type) and issubclass(constructor, MapHead)

"""The table of heads.

To add a head, add a line in `HEADS`, or write a file and name it by `objective.head
module:FILE.py:NAME`. A head is made by a function or Module class that takes (width, teacher_width)
and returns a Module from tokens (B, N, width) to (B, N, teacher_width), or by a subclass of
`MapHead`.
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
"""The constructors of the built-in heads by name."""


def make(
    name: str, width: int, teacher_width: int, maps: Callable[[], MapShapes] | None
) -> nn.Module:
    """Returns the head that a recipe names.

    Args:
        name: A name in `HEADS`, or the user's own `module:FILE.py:NAME` (fd_large/doors.py).
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's tokens.
        maps: Returns the shapes from which a `MapHead` is made; None if the head is no `MapHead`.

    Raises: ConfigError: if the head does not exist or does not fit.
    """
    constructor = doors.load(name, kind="heads", where=WHERE, built_in=HEADS)
    arguments = [maps()] if maps is not None and reads_maps(constructor) else []
    return make_head(name, width, teacher_width, *arguments, built_in=HEADS, where=WHERE)


def reads_maps(make: Make) -> bool:
    """Whether `make`, a constructor of heads, is a subclass of `MapHead` or a partial of one."""
    constructor = make.func if isinstance(make, partial) else make
    return isinstance(constructor, type) and issubclass(constructor, MapHead)

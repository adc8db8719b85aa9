"""What maps a student's tokens to the teacher's width, trained and then thrown away.

Adding a head is a line in `HEADS`, or a file of the user's own (`objective.head
module:FILE.py:NAME`): a function or Module class of (width, teacher_width) that gives a Module from
tokens (B, N, width) to (B, N, teacher_width).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fd_large import doors
from fd_large.errors import ConfigError

WHERE = "objective.head"


def linear(width: int, teacher_width: int) -> nn.Linear:
    """The 1x1 convolution of the paper; torch's default initialisation, as published."""
    return nn.Linear(width, teacher_width)


HEADS: dict[str, Any] = {"linear": linear}
"""The built-in heads."""


def make_head(name: str, width: int, teacher_width: int) -> nn.Module:
    """Constructs the head that a recipe names, with weights from torch's global generator.

    Args:
        name: A name in `HEADS`, or one of the user's own (fd_large/doors.py).
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's tokens.

    Raises: ConfigError: if there is no such head, or it is no Module.
    """
    make = doors.load(name, kind="heads", where=WHERE, built_in=HEADS)
    try:
        head = make(width, teacher_width)
    except Exception as error:  # The user's code may raise anything.
        raise ConfigError(
            f"{WHERE}: {name} cannot be made; got {type(error).__name__}: {error}, expected a "
            "Module from (width, teacher_width). Correct the head."
        ) from error
    if not isinstance(head, nn.Module):
        raise ConfigError(
            f"{WHERE}: {name} gives no Module; got {type(head).__name__}, expected a torch Module "
            "made of (width, teacher_width). Correct the head."
        )
    return head


def check_head(head: nn.Module, name: str, width: int, teacher_width: int) -> None:
    """Runs a head that was built on the meta device on the shapes of a few tokens.

    Raises: ConfigError: if that fails, or gives another shape than the teacher's tokens have.
    """
    try:
        with torch.no_grad():
            got = str(tuple(head(torch.empty(2, 3, width, device="meta")).shape))
    except Exception as error:  # The user's code may raise anything.
        got = f"{type(error).__name__}: {error}".splitlines()[0]
    if got != str((2, 3, teacher_width)):
        raise ConfigError(
            f"{WHERE}: {name} does not map tokens (2, 3, {width}); got {got}, expected "
            f"(2, 3, {teacher_width}), the teacher's width. Correct the head."
        )

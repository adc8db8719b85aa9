"""What maps a student's tokens to the teacher's width, trained and then thrown away.

Adding a head is a line in `HEADS`, or a file of the user's own (`objective.head
module:FILE.py:NAME`): a function or Module class of (width, teacher_width) that gives a Module from
tokens (B, N, width) to (B, N, teacher_width).
"""

from __future__ import annotations

from torch import nn

from fd_large.engine.heads import Make

WHERE = "objective.head"


def linear(width: int, teacher_width: int) -> nn.Module:
    """The 1x1 convolution of the paper; torch's default initialisation, as published."""
    return nn.Linear(width, teacher_width)


HEADS: dict[str, Make] = {"linear": linear}
"""The built-in heads."""

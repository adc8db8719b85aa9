"""The table of heads.

Adding a head is a line in `HEADS`, or a file of the user's own (`objective.head
module:FILE.py:NAME`): a function or Module class of (width, teacher_width) that gives a Module from
tokens (B, N, width) to (B, N, teacher_width), or a `MapHead`.
"""

from __future__ import annotations

from fd_large.engine.heads import Make
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
}
"""The built-in heads."""

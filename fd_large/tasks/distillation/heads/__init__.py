"""What maps a student's tokens to a teacher's width, trained and then thrown away."""

from fd_large.tasks.distillation.heads.map_head import WHERE
from fd_large.tasks.distillation.heads.registry import HEADS

__all__ = ["HEADS", "WHERE"]

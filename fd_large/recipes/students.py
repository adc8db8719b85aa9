"""Distilled students that recipes of other tasks start from."""

from __future__ import annotations

from fd_large.recipes.architectures import overrides, resolve
from fd_large.recipes.sections import Student

# Windows of the stages at 192 px with windows of 12: the last map is smaller than one.
DISTILLED_AT_192 = (12, 12, 12, 6)


def vit(model: str, drop_path_rate: float) -> Student:
    """Returns the student section of a ViT that has a table of relative positions in each block.

    Each table starts as a copy of the table that all blocks shared in the distillation; the blocks
    of the named model share one table.
    """
    named = resolve(model)
    return Student(
        model=model,
        architecture=overrides(named.with_own_position_biases(), named),
        drop_path_rate=drop_path_rate,
    )

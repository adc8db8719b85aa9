"""Chooses the sizes of communication buckets, and the blocks that ZeRO-3 gathers at once.

A bucket must be large enough to hide a collective's fixed cost, and small enough that communication
begins early. Stage 3 gathers all parameters of a block at once if they fit a bucket.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

MOST_ELEMENTS, LEAST_ELEMENTS = 100_000_000, 8_000_000
PREFETCH_ELEMENTS = 51_000_000
# Ranks up to which a gradient's sum goes to the rank that steps its parameter alone (stages 1, 2).
# Such a sum goes through all ranks in a row, in a bucket for each owner: over many ranks the hops
# of the many small messages take longer than an all-reduce of twice the bytes. Where "many" begins
# is assumed; it was not measured on GPUs.
MOST_OWNERS = 8


def gradient_bucket(parameters: int) -> int:
    """Returns the number of gradient elements in a bucket.

    The number is a thirtieth of the trained parameters, but at least `LEAST_ELEMENTS` and at most
    `MOST_ELEMENTS`.

    Args:
        parameters: Number of trained parameters.
    """
    return min(MOST_ELEMENTS, max(LEAST_ELEMENTS, parameters // 30))


def prefetch_bucket(parameters: int) -> int:
    """Returns the number of elements that stage 3 gathers ahead of their use, about a block.

    The number is a twelfth of the model's parameters, as ViT-B has twelve blocks, but at least
    `LEAST_ELEMENTS` / 4 and at most `PREFETCH_ELEMENTS`.

    Args:
        parameters: Number of trained parameters, or of parameters of a frozen model.
    """
    return min(PREFETCH_ELEMENTS, max(LEAST_ELEMENTS // 4, parameters // 12))


def gathered_whole(
    backbone: Any, bucket: int, size: Callable[[nn.Parameter], int] = methodcaller("numel")
) -> dict[nn.Module, list[nn.Module]]:
    """Returns the modules whose parameters stage 3 gathers at once.

    A backbone's block is gathered at once if its parameters fit the bucket. A module of a block
    that the backbone calls outside of the block's forward is gathered separately.

    Args:
        backbone: A module with `blocks()`.
        bucket: Largest number of elements that are gathered at once.
        size: Function that returns the number of elements of a parameter, over all ranks.

    Returns: for each module that is gathered at once, the modules in it (itself included) whose
        parameters are gathered; empty if the backbone has no method `outside_blocks()`.
    """
    if not hasattr(backbone, "outside_blocks"):
        return {}
    outside = backbone.outside_blocks()
    apart = {module for part in outside for module in part.modules()}
    units = {block: [m for m in block.modules() if m not in apart] for block in backbone.blocks()}
    units |= {part: [*part.modules()] for part in outside}
    return {
        unit: modules
        for unit, modules in units.items()
        if sum(size(p) for m in modules for p in m.parameters(recurse=False)) <= bucket
    }

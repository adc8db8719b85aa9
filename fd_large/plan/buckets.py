"""Chooses communication buckets: large enough to hide fixed costs, small enough to begin early.

The file also chooses the blocks that stage 3 gathers at once, because they fit a bucket.
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

    Args:
        parameters: Trained parameters. A bucket holds a thirtieth of them, since each bucket has a
            cost, but no fewer than LEAST_ELEMENTS and no more than MOST_ELEMENTS.
    """
    return min(MOST_ELEMENTS, max(LEAST_ELEMENTS, parameters // 30))


def prefetch_bucket(parameters: int) -> int:
    """Returns the number of elements that stage 3 gathers ahead, and at once: about a block.

    Args:
        parameters: Trained parameters, or those of a frozen model. A ViT-B has twelve blocks.
    """
    return min(PREFETCH_ELEMENTS, max(LEAST_ELEMENTS // 4, parameters // 12))


def gathered_whole(
    backbone: Any, bucket: int, size: Callable[[nn.Parameter], int] = methodcaller("numel")
) -> dict[nn.Module, list[nn.Module]]:
    """Returns the modules that stage 3 gathers at once, each with the modules inside it.

    These are the blocks that fit the bucket, and separately those of their modules that the
    backbone calls outside of the blocks' forwards. A backbone without the method `outside_blocks()`
    has none.

    Args:
        backbone: A module with `blocks()`.
        bucket: Elements that are gathered ahead.
        size: The elements of a parameter, over all ranks.
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

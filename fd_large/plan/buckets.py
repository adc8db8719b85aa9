"""Sizes of communication buckets: large enough to hide fixed costs, small enough to begin early."""

from __future__ import annotations

MOST_ELEMENTS, LEAST_ELEMENTS = 100_000_000, 8_000_000
PREFETCH_ELEMENTS = 51_000_000
# Ranks up to which a gradient's sum goes to the rank that steps its parameter alone (stages 1, 2).
# It goes through all ranks in a row, a bucket for each owner: over many ranks the hops of the many
# small messages take longer than an all-reduce of twice the bytes. Where "many" begins is assumed;
# it was not measured on GPUs.
MOST_OWNERS = 8


def gradient_bucket(parameters: int) -> int:
    """Returns the number of gradient elements in a bucket.

    Args:
        parameters: Trained parameters. Of the buckets there are about thirty, each of which has a
            cost; of a small model fewer, so that none is small.
    """
    return min(MOST_ELEMENTS, max(LEAST_ELEMENTS, parameters // 30))


def prefetch_bucket(parameters: int) -> int:
    """Returns the number of elements that stage 3 gathers ahead, and at once: about a block.

    Args:
        parameters: Trained parameters, or those of a frozen model. A ViT-B has twelve blocks.
    """
    return min(PREFETCH_ELEMENTS, max(LEAST_ELEMENTS // 4, parameters // 12))

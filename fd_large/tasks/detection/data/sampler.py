"""The order of an epoch in which a global batch holds images of one orientation.

Padding a batch of wide and high images to one size would waste up to half of it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fd_large.data.sampler import epoch_order


def grouped_order(
    landscape: NDArray[np.bool_], seed: int, epoch: int, global_batch_size: int
) -> NDArray[np.int64]:
    """The samples of an epoch, global batch by global batch, each of one orientation.

    The epoch's permutation is dealt into two piles; whenever one holds a global batch, that is the
    next. As many batches as the whole set fills must come of it: where both piles end before a
    whole batch though together they fill one, the larger takes in its own first samples again.

    Args:
        landscape: Of each sample whether it is at least as wide as high, (N,).
        seed: The run's seed.
        epoch: Counted from 0.
        global_batch_size: G.

    Returns: (N // G * G,) sample indices; the same for any number of ranks.
    """
    order = epoch_order(len(landscape), seed, epoch, np.arange(len(landscape)))
    piles = [np.flatnonzero(landscape[order]), np.flatnonzero(~landscape[order])]
    batches: list[tuple[int, NDArray[np.int64]]] = []
    for pile in piles:  # of places in the order
        whole = len(pile) // global_batch_size * global_batch_size
        for batch in pile[:whole].reshape(-1, global_batch_size):
            batches.append((int(batch[-1]), batch))
    if len(batches) < len(order) // global_batch_size:
        rest, pile = max(
            ((len(pile) % global_batch_size, pile) for pile in piles), key=lambda pair: pair[0]
        )
        again = np.resize(pile, global_batch_size - rest)
        batches.append((len(order), np.concatenate([pile[len(pile) - rest :], again])))
    batches.sort(key=lambda pair: pair[0])
    return order[np.concatenate([batch for _, batch in batches])]

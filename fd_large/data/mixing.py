"""Partners of images in a global batch, and images mixed with their partners.

All images of a group are mixed with the same share. In the published code a group is the batch of
a GPU; here it is 128 positions of the epoch's order, whatever the number of GPUs. Partners are
neighbours in that order. (timm pairs images by reversing the batch of a GPU, and lightly-train by a
permutation.) Since the order of an epoch is random, any pairing is random; with neighbours as
partners, a rank seldom has to load more than its own images.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large.data.random_numbers import uniforms

GROUP = 128
"""Images of a group: the batch of a GPU in finetune/*.yaml of Feature-Distillation."""


def group_starts(positions: NDArray[np.int64], global_batch_size: int) -> NDArray[np.int64]:
    """Returns the first position of each position's group.

    Args:
        positions: (B,), in the epoch's order.
        global_batch_size: G; a global batch is positions k*G to (k+1)*G - 1.
    """
    return positions - positions % global_batch_size % GROUP


def partners(positions: NDArray[np.int64], global_batch_size: int) -> NDArray[np.int64]:
    """Returns each position's partner: its neighbour in the global batch, or itself if unpaired.

    Args:
        positions: (B,), in the epoch's order.
        global_batch_size: G; a global batch is positions k*G to (k+1)*G - 1.
    """
    place = positions % global_batch_size
    other = place ^ 1
    return positions - place + np.where(other < global_batch_size, other, place)


def with_partners(
    positions: NDArray[np.int64], global_batch_size: int
) -> tuple[NDArray[np.int64], Tensor]:
    """Returns positions extended by missing partners, and the index of each partner.

    Args:
        positions: (B,), in the epoch's order.
        global_batch_size: G; a global batch is positions k*G to (k+1)*G - 1.

    Returns: (B + R,) positions, the given ones first; (B,) indices of the partners.
    """
    other = partners(positions, global_batch_size)
    every = np.concatenate([positions, np.setdiff1d(other, positions)])
    at = {position: place for place, position in enumerate(every.tolist())}
    return every, torch.tensor([at[position] for position in other.tolist()])


def mixed(images: Tensor, others: Tensor, share: float | Tensor) -> Tensor:
    """Returns the weighted mean of images and their partners.

    Args:
        images: (B, 3, H, W), floating-point.
        others: (B, 3, H, W), the partners.
        share: Weight of the image itself; its partner has 1 - share. A number, or (B, 1, 1, 1).

    Source: Zhang et al., arXiv 1710.09412.
    """
    return images * share + others * (1.0 - share)


def mixed_views(
    views: Tensor,
    positions: NDArray[np.int64],
    partners: Tensor,
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
) -> Tensor:
    """Returns uint8 views, each mixed with its partner's by the group's share, drawn in [0, 1).

    Rounding to whole levels moves a pixel by half a level at most. Source: distillation in
    lightly-train, where both models see the mix.

    Args:
        views: (B + R, 3, S, S) uint8, in the order of `with_partners`.
        positions: (B,), in the epoch's order.
        partners: (B,), the indices of their partners among the views.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        global_batch_size: G; a global batch is positions k*G to (k+1)*G - 1.
    """
    starts = group_starts(positions, global_batch_size)
    shares = torch.from_numpy(uniforms(seed, epoch, starts, "mixing", 1)).float()
    originals, others = views[: len(positions)].float(), views[partners].float()
    return mixed(originals, others, shares[:, :, None, None]).round().to(torch.uint8)

"""Pairs the images of a global batch, and mixes each image with its partner (mixup).

All images of a group are mixed with the same weight. In the published code of Feature-Distillation
a group is the batch of a GPU. Here a group is 128 consecutive positions of a global batch, whatever
the number of GPUs, and partners are neighbours in the epoch's order. (timm pairs images by
reversing the batch of a GPU, and lightly-train by a permutation.) Since the order of an epoch is
random, any pairing is random. With neighbours as partners, a rank seldom has to load more than its
own images.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large.data.random_numbers import uniforms

GROUP = 128
"""Number of images in a group: the batch size of a GPU in finetune/*.yaml of
Feature-Distillation."""


def group_starts(positions: NDArray[np.int64], global_batch_size: int) -> NDArray[np.int64]:
    """Returns for each position the first position of its group of `GROUP` positions, (B,).

    All images of a group are mixed with their partners by the same weight. Groups are consecutive
    positions of a global batch, whose last group may be smaller. Here and below, a global batch has
    the positions k*G to (k+1)*G - 1 of the epoch's order, where G is `global_batch_size`.
    """
    return positions - positions % global_batch_size % GROUP


def partners(positions: NDArray[np.int64], global_batch_size: int) -> NDArray[np.int64]:
    """Returns for each position the position of its partner, (B,).

    The first and second position of a global batch are partners, then the third and fourth, and so
    on. The last position of a global batch of odd size is its own partner.
    """
    place = positions % global_batch_size
    other = place ^ 1
    return positions - place + np.where(other < global_batch_size, other, place)


def with_partners(
    positions: NDArray[np.int64], global_batch_size: int
) -> tuple[NDArray[np.int64], Tensor]:
    """Adds the partners that are missing among some positions (B,).

    Returns: (B + R,) the given positions followed by R missing partners; (B,) for each given
        position the index of its partner in the first result.
    """
    other = partners(positions, global_batch_size)
    every = np.concatenate([positions, np.setdiff1d(other, positions)])
    at = {position: place for place, position in enumerate(every.tolist())}
    return every, torch.tensor([at[position] for position in other.tolist()])


def mixed(images: Tensor, others: Tensor, share: float | Tensor) -> Tensor:
    """Returns the weighted mean of images and their partners, both (B, 3, H, W) floating-point.

    `share` is the weight of the image itself, a number or (B, 1, 1, 1); its partner's is 1 - share.

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
    """Mixes each view with the view of its partner by a random weight in [0, 1).

    Each group of `GROUP` consecutive positions of a global batch has one weight. The result is
    rounded to whole grey levels, which changes a pixel by half a level at most.

    Args:
        views: (B + R, 3, S, S) uint8, in the order of `with_partners`.
        positions: (B,), in the epoch's order.
        partners: (B,), the index of each position's partner among the views.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        global_batch_size: As in `group_starts`.

    Returns: (B, 3, S, S) uint8.
    Source: distillation in lightly-train, where teacher and student see the mixed images.
    """
    starts = group_starts(positions, global_batch_size)
    shares = torch.from_numpy(uniforms(seed, epoch, starts, "mixing", 1)).float()
    originals, others = views[: len(positions)].float(), views[partners].float()
    return mixed(originals, others, shares[:, :, None, None]).round().to(torch.uint8)

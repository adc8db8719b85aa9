"""Which teachers each image learns from, decided on the images of a whole step.

The loss of a step is the mean over all pairs of image and teacher that are kept. Public codes
take that mean on each rank by itself, so that pairs of ranks that keep few weigh more, and another
number of ranks is another loss. Here their number is known for the whole step before the student
runs: dropping keeps the worst teacher of an image, and tosses a coin for each of the others. The
k-th coin is for the k-th of the others, in the teachers' order, whichever the worst is. So the
number of kept ones does not depend on the losses, and the distribution is the published one, where
each of the others has a coin of its own.

Source: Sariyildiz et al. (UNIC), arXiv 2408.05088, and Sariyildiz et al. (DUNE), arXiv 2503.14405.
"""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fd_large.data.random_numbers import uniforms


def coins(
    seed: int, epoch: int, positions: ArrayLike, *, teachers: int, drop_probability: float
) -> Tensor:
    """Returns which of the teachers besides the worst are kept, (teachers - 1, B) bool, on the CPU.

    Args:
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        positions: (B,), in the epoch's order.
        teachers: T.
        drop_probability: Probability of each to be dropped, in [0, 1].
    """
    draws = uniforms(seed, epoch, positions, "teachers", teachers - 1)
    return torch.from_numpy(draws >= drop_probability).T.contiguous()


def kept_beside_worst(losses: Tensor, coins: Tensor) -> Tensor:
    """Returns which teachers each image learns from, (T, B) bool.

    Args:
        losses: (T, B), the loss of each image by each teacher. Of equal ones the first is the
            worst.
        coins: (T - 1, B) bool, which of the others are kept.
    """
    worst = losses.detach().argmax(0, keepdim=True)
    numbers = torch.arange(len(losses), device=losses.device)[:, None]
    others = (numbers - (numbers > worst).long()).clamp(max=len(coins) - 1)
    return (numbers == worst) | coins.gather(0, others)


def kept_of_own_data(datasets: Tensor, teaches: Tensor) -> Tensor:
    """Returns which teachers each image learns from, (T, B) bool: those of its dataset.

    Args:
        datasets: (B,) int64, the number of each image's dataset.
        teaches: (T, number of datasets) bool, whether a teacher teaches the images of a dataset.
    """
    return teaches[:, datasets]


def weighted_loss(losses: Tensor, kept: Tensor, number: Tensor, *, parts: int) -> Tensor:
    """Returns a micro batch's share of the mean over all kept pairs of a step, a scalar.

    Args:
        losses: (T, B), the loss of each image by each teacher.
        kept: (T, B) bool.
        number: How many are kept in the whole step, a scalar.
        parts: Micro batches of the step on all ranks, whose losses and gradients are averaged.
    """
    # Not by a product: what is left out may be infinite.
    return parts * losses.where(kept, 0).sum() / number.to(losses)

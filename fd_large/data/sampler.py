"""Which sample goes where: the order of an epoch, and each rank's slice of a global batch.

No list as long as the dataset is ever made: the permutation is evaluated where it is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fd_large.data.random_numbers import random_words
from fd_large.errors import ConfigError, DataError

_NUM_FEISTEL_ROUNDS = 8


def epoch_order(num_samples: int, seed: int, epoch: int, positions: ArrayLike) -> NDArray[np.int64]:
    """The samples at some positions of the epoch's order, a permutation of all samples.

    A number below side**2 >= num_samples is read as two digits to the base side, which pass
    through a Feistel network whose round function is Philox; what falls outside the dataset is
    passed through again until it is inside (cycle walking). Both steps keep a bijection, and
    fewer than 2 * sqrt(num_samples) + 1 numbers lie outside, so few are walked.

    Args:
        num_samples: Size of the dataset.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        positions: (B,), each below num_samples.

    Returns: (B,) sample indices.
    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002 (the
        generalised Feistel network and cycle walking).
    """
    numbers = np.array(positions, dtype=np.int64, ndmin=1)
    assert num_samples > 0
    assert numbers.size == 0 or (numbers.min() >= 0 and numbers.max() < num_samples)
    side = math.isqrt(num_samples - 1) + 1  # ceil(sqrt(num_samples))
    numbers = _feistel(numbers, side, seed, epoch)
    while (outside := numbers >= num_samples).any():
        numbers[outside] = _feistel(numbers[outside], side, seed, epoch)
    return numbers


def _feistel(numbers: NDArray[np.int64], side: int, seed: int, epoch: int) -> NDArray[np.int64]:
    left, right = np.divmod(numbers, side)
    for number in range(_NUM_FEISTEL_ROUNDS):
        words = random_words(seed, epoch, right, "order", first_block=number)  # (B, 1, 4)
        bits = (words[:, 0, 0] << np.uint64(32)) | words[:, 0, 1]
        shift = (bits % np.uint64(side)).astype(np.int64)
        left, right = right, (left + shift) % side
    return left * side + right


def updates_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Whole global batches in an epoch; the rest of the order is dropped."""
    return num_samples // global_batch_size


class Portion(NamedTuple):
    """Which micro batches of an epoch a rank wants.

    Attributes:
        epoch: Epoch, counted from 0.
        first_update: Step of this epoch at which a resumed run goes on, counted from 0.
        micro_batch_size: Images a batch.
        rank: This rank, counted from 0.
        world_size: The number of ranks.
    """

    epoch: int
    first_update: int
    micro_batch_size: int
    rank: int
    world_size: int


@dataclass(frozen=True)
class MicroBatches:
    """Where in the epoch's order a rank reads, (B,) int64 for one micro batch after the other.

    Global batch k is positions k*G to (k+1)*G - 1, rank r's slice of it G/W consecutive ones,
    and a micro batch a consecutive part of that.

    Attributes:
        num_samples: Size of the dataset.
        portion: Which of them.
        global_batch_size: G, images a step over all ranks; W micro batches divide it.
    """

    num_samples: int
    portion: Portion
    global_batch_size: int

    @property
    def _updates(self) -> range:
        end = updates_per_epoch(self.num_samples, self.global_batch_size)
        assert 0 <= self.portion.first_update <= end
        return range(self.portion.first_update, end)

    @property
    def _share(self) -> int:
        assert 0 <= self.portion.rank < self.portion.world_size
        return self.global_batch_size // self.portion.world_size

    def __len__(self) -> int:
        return len(self._updates) * (self._share // self.portion.micro_batch_size)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for update in self._updates:
            start = update * self.global_batch_size + self.portion.rank * self._share
            positions = np.arange(start, start + self._share)
            yield from positions.reshape(-1, self.portion.micro_batch_size)


def check_batch_sizes(
    num_samples: int, *, global_batch_size: int, micro_batch_size: int, world_size: int
) -> None:
    """Refuses batch sizes that do not divide, or which leave the dataset without one global batch.

    Args:
        num_samples: Size of the dataset.
        global_batch_size: Images a step over all ranks.
        micro_batch_size: Images a forward pass of one rank.
        world_size: The number of ranks.

    Raises:
        ConfigError: if a size is not positive or the global batch does not divide into micro
            batches on all ranks; the message names the nearest sizes that do.
        DataError: if the global batch is larger than the dataset.
    """
    for key, size in (
        ("global_batch_size", global_batch_size),
        ("micro_batch_size", micro_batch_size),
    ):
        if size < 1:
            raise ConfigError(
                f"batch.{key}: not a number of images; got {size}, expected 1 or more. "
                f"Set --batch.{key} to a positive number."
            )
    step = world_size * micro_batch_size
    if global_batch_size % step:
        below = global_batch_size // step * step
        near = " or ".join(str(size) for size in (below, below + step) if size)
        remedy = f"Set --batch.global_batch_size to {near}"
        if global_batch_size % world_size == 0:
            near = " or ".join(map(str, _nearest_divisors(
                global_batch_size // world_size, micro_batch_size
            )))  # fmt: skip
            remedy += f", or --batch.micro_batch_size to {near}"
        elif global_batch_size % micro_batch_size == 0:
            ranks = _nearest_divisors(global_batch_size // micro_batch_size, world_size)
            remedy += f", or start {' or '.join(map(str, ranks))} ranks"
        raise ConfigError(
            "batch.global_batch_size: does not divide into micro batches on all ranks; "
            f"got global_batch_size {global_batch_size} with micro_batch_size "
            f"{micro_batch_size} on {world_size} {'ranks' if world_size > 1 else 'rank'}, "
            f"expected a multiple of {step} ({world_size} x {micro_batch_size}). {remedy}."
        )
    if global_batch_size > num_samples:
        largest = num_samples // step * step
        remedy = (
            f"Set --batch.global_batch_size to {largest} or less, or add images"
            if largest
            else f"Add images, or lower --batch.micro_batch_size (now {micro_batch_size}) too"
        )
        raise DataError(
            "batch.global_batch_size: larger than the dataset; got global_batch_size "
            f"{global_batch_size} and {num_samples} images in data.root, expected at least one "
            f"global batch an epoch. {remedy}."
        )


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """The largest divisor of number below wanted and the smallest above."""
    below = next(size for size in range(min(wanted, number), 0, -1) if number % size == 0)
    above = next((size for size in range(wanted, number + 1) if number % size == 0), None)
    return [below] if above is None or above == below else [below, above]

"""The order of samples in an epoch, and each rank's slice of a global batch.

No list as long as the dataset is ever made, since the permutation is computed only for the needed
positions. Samples that can only be read in blocks (row groups of parquet files, tar files of an
object store) are shuffled within windows of blocks, so that each block is read once in an epoch
(`Blocks`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fd_large.data.random_numbers import random_words
from fd_large.errors import DataError
from fd_large.recipes.batch_sizes import check_division

_NUM_FEISTEL_ROUNDS = 8
# Least numbers of blocks and of samples in a window.
WINDOW_BLOCKS = 8
WINDOW_SAMPLES = 10_000


def epoch_order(num_samples: int, seed: int, epoch: int, positions: ArrayLike) -> NDArray[np.int64]:
    """Returns the samples at some positions of the epoch's order, a permutation of all samples.

    A position is written as two digits to the base `side`, where side**2 >= num_samples. The digits
    pass through a Feistel network with Philox as the round function. A result that is not below
    num_samples passes through the network again, until the result is below num_samples (cycle
    walking). Both steps are bijections. Fewer than 2 * sqrt(num_samples) + 1 results are too large,
    so that few positions pass through the network again.

    Args:
        num_samples: Number of samples of the whole dataset.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        positions: (B,), each below num_samples.

    Returns: (B,) int64, indices of samples.
    Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002 (the generalised
        Feistel network and cycle walking).
    """
    return _permuted(num_samples, seed, epoch, positions, "order")


def _permuted(
    num_samples: int, seed: int, epoch: int, positions: ArrayLike, stream: str, first: int = 0
) -> NDArray[np.int64]:
    """Computes `epoch_order` with random numbers of another purpose.

    Args:
        stream: Purpose of the random numbers, a name in `random_numbers.STREAMS`.
        first: Number that is added to the positions for which random numbers are drawn, so that
            several permutations can use one stream.
    """
    numbers = np.array(positions, dtype=np.int64, ndmin=1)
    assert num_samples > 0
    assert numbers.size == 0 or (numbers.min() >= 0 and numbers.max() < num_samples)
    side = math.isqrt(num_samples - 1) + 1  # ceil(sqrt(num_samples))

    def feistel(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        left, right = np.divmod(numbers, side)
        for number in range(_NUM_FEISTEL_ROUNDS):
            words = random_words(seed, epoch, right + first, stream, first_block=number)
            bits = (words[:, 0, 0] << np.uint64(32)) | words[:, 0, 1]  # words: (B, 1, 4)
            shift = (bits % np.uint64(side)).astype(np.int64)
            left, right = right, (left + shift) % side
        return left * side + right

    numbers = feistel(numbers)
    while (outside := numbers >= num_samples).any():
        numbers[outside] = feistel(numbers[outside])
    return numbers


class Blocks:
    """Blocks of consecutive samples that are fetched together, and the order of an epoch over them.

    The blocks are permuted in each epoch. Of the permuted blocks, every `per_window` consecutive
    blocks make a window, and the samples of a window are permuted. The order depends only on the
    seed, the epoch and the sizes of the blocks.

    Attributes:
        ends: (num_blocks,) int64, the number of samples up to the end of each block. A block has
            at least one sample.
        per_window: Number of blocks in a window; the last window may have fewer.
    """

    def __init__(self, ends: NDArray[np.int64]) -> None:
        self.ends = ends
        mean_size = int(ends[-1]) / len(ends)
        self.per_window = max(WINDOW_BLOCKS, math.ceil(WINDOW_SAMPLES / mean_size))

    def block(self, sample: int) -> tuple[int, int]:
        """Returns the number of the block with a sample, and the sample's index in this block."""
        number = int(np.searchsorted(self.ends, sample, side="right"))
        return number, sample - (int(self.ends[number - 1]) if number else 0)

    def order(self, seed: int, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns which samples an epoch has at some positions.

        Args:
            seed: The run's seed.
            epoch: Epoch, counted from 0.
            positions: (B,), positions in the epoch's order.

        Returns: (B,) int64, indices of samples.
        """
        blocks, ends, starts = self._layout(seed, epoch)
        samples = np.empty(len(positions), np.int64)
        windows = np.searchsorted(starts, positions, side="right") - 1
        for window in np.unique(windows).tolist():
            here = windows == window
            start, stop = self._bounds(window, starts)
            mixed = start + _permuted(
                stop - start, seed, epoch, positions[here] - start, "in_window", start
            )
            # `mixed` are places in the permuted blocks; they are mapped back to samples.
            slots = np.searchsorted(ends, mixed, side="right")
            samples[here] = self.ends[blocks[slots]] - (ends[slots] - mixed)
        return samples

    def stand_in(self, seed: int, epoch: int, position: int, draw: float) -> int:
        """Returns the index of a sample that replaces the sample at a position.

        The replacement is from the same window of blocks as the position, and `draw`, a random
        number in [0, 1), chooses it.
        """
        _, _, starts = self._layout(seed, epoch)
        window = int(np.searchsorted(starts, position, side="right")) - 1
        start, stop = self._bounds(window, starts)
        place = start + int(draw * (stop - start))
        return int(self.order(seed, epoch, np.array([place]))[0])

    def ahead(self, seed: int, epoch: int, position: int) -> list[int]:
        """Returns the numbers of the blocks that are needed at a position and soon after it.

        The result has the blocks of the position's window, and then the blocks of the next window.
        After the last window of an epoch, the next window is the first window of the next epoch.
        """
        blocks, _, starts = self._layout(seed, epoch)
        window = int(np.searchsorted(starts, position, side="right")) - 1
        first = window * self.per_window
        needed = blocks[first : first + 2 * self.per_window].tolist()
        if window == len(starts) - 1:
            following, _, _ = self._layout(seed, (epoch + 1) % 2**32)
            needed += following[: self.per_window].tolist()
        return list(dict.fromkeys(needed))

    def _bounds(self, window: int, starts: NDArray[np.int64]) -> tuple[int, int]:
        stop = starts[window + 1] if window + 1 < len(starts) else self.ends[-1]
        return int(starts[window]), int(stop)

    @lru_cache(maxsize=4)  # noqa: B019 - as many as there are epochs and datasets in use
    def _layout(
        self, seed: int, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Returns the order of the blocks in an epoch.

        Returns: (num_blocks,) the permuted numbers of the blocks; (num_blocks,) the position in the
            epoch at which each of these blocks ends; (num_windows,) the position at which each
            window starts.
        """
        count = len(self.ends)
        blocks = _permuted(count, seed, epoch, np.arange(count), "blocks")
        ends = np.cumsum(np.diff(self.ends, prepend=0)[blocks])
        starts = np.concatenate([[0], ends[self.per_window - 1 : -1 : self.per_window]])
        return blocks, ends, starts


def samples_at(
    source: Any, seed: int, epoch: int, positions: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Returns which samples of a source an epoch has at some positions, as `Blocks.order`.

    If the source, an `ImageSource`, is read in blocks, this function also starts to fetch the
    blocks needed next.
    """
    blocks: Blocks | None = getattr(source, "blocks", None)
    if blocks is None:
        return epoch_order(len(source), seed, epoch, positions)
    source.expect(blocks.ahead(seed, epoch, int(positions.min())))
    return blocks.order(seed, epoch, positions)


def updates_per_epoch(num_samples: int, global_batch_size: int) -> int:
    """Returns the number of steps in an epoch; a last, incomplete global batch is dropped."""
    return num_samples // global_batch_size


class Portion(NamedTuple):
    """The part of an epoch that a rank loads.

    Attributes:
        epoch: Epoch, counted from 0.
        first_update: First step of this epoch to load, counted from 0; a resumed run may begin
            within an epoch.
        micro_batch_size: Number of images in a micro-batch.
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
    """Iterable of a rank's positions in the epoch's order, (B,) int64 for each micro-batch.

    Global batch k has the positions k*G to (k+1)*G - 1. Of these positions, each of the W ranks has
    G/W consecutive positions, which are divided into micro-batches of consecutive positions.

    Attributes:
        num_samples: Number of samples of the whole dataset.
        portion: The part of the epoch that the rank loads.
        global_batch_size: G, the number of images in a step over all ranks; a multiple of W times
            the micro-batch size.
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
    """Checks that the batch sizes divide, and that the dataset has at least one global batch.

    Args:
        num_samples: Number of samples of the whole dataset.
        global_batch_size: Number of images in a step over all ranks.
        micro_batch_size: Number of images in a micro-batch.
        world_size: The number of ranks.

    Raises:
        ConfigError: if a size is not positive, or the global batch size is not a multiple of the
            micro-batch size times the number of ranks.
        DataError: if the global batch is larger than the dataset.
    """
    check_division(
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
    )
    if global_batch_size > num_samples:
        step = world_size * micro_batch_size
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

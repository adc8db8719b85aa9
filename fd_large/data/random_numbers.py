"""Counter-based random numbers, which depend on (seed, epoch, position, stream) alone.

With a stateful generator, a random number would depend on the numbers drawn before, and so on the
rank, the loading process, and whether a run was resumed. Here a random number is the output of
Philox-4x32-10 for a counter made of epoch, position and stream, with the seed as the key.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Tests
compare the algorithm with the known answers of its authors' library Random123.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

STREAMS = {
    "order": 0,
    "view": 1,
    "drop_path": 2,
    "color": 3,
    "replacement": 4,
    "canary": 5,
    "augmentation": 6,
    "erasing": 7,
    "erasing_noise": 8,
    "mixing": 9,
    "jitter": 10,
    "anchors": 11,
    "proposals": 12,
    "blocks": 13,
    "in_window": 14,
    "dropout": 15,
    "copies": 16,
    "teachers": 17,
    "image_size": 18,
    "mask": 19,
    "mask_ratio": 20,
}

_WORD = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10
_MAX_BLOCKS = 1 << 24


def philox(
    counter: Sequence[NDArray[np.uint64]], key: tuple[int, int]
) -> tuple[NDArray[np.uint64], ...]:
    """Computes the random number generator Philox-4x32-10 for each element of a counter.

    Args:
        counter: Four arrays of 32-bit words, whose shapes broadcast. Words are held in uint64, so
            that the product of two words fits.
        key: Two words of 32 bits.

    Returns: four arrays of random 32-bit words, in uint64, of the broadcast shape.
    """
    a, b, c, d = counter
    key_a, key_b = key
    for _ in range(_NUM_ROUNDS):
        product_a, product_c = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = (product_c >> _SHIFT) ^ b ^ np.uint64(key_a)
        b = product_c & _WORD
        c = (product_a >> _SHIFT) ^ d ^ np.uint64(key_b)
        d = product_a & _WORD
        key_a, key_b = (key_a + _KEY_STEPS[0]) % 2**32, (key_b + _KEY_STEPS[1]) % 2**32
    return a, b, c, d


def random_words(
    seed: int,
    epoch: int,
    positions: ArrayLike,
    stream: str | int,
    *,
    first_block: int = 0,
    num_blocks: int = 1,
) -> NDArray[np.uint64]:
    """Returns random words for each position, in blocks of four words of 32 bits.

    The seed is the key. The counter has four words: one word with the stream (8 bits) and the block
    (24 bits), two words with the position, and one word with the epoch. So no two draws of a run
    share a counter.

    Args:
        seed: 0 to 2**64 - 1.
        epoch: 0 to 2**32 - 1.
        positions: (B,), whole numbers from 0.
        stream: A name in `STREAMS`, or a number below 256 for a use without a name here.
        first_block: Block of the stream to start from.
        num_blocks: Number of blocks to draw.

    Returns: (B, num_blocks, 4) uint64, each below 2**32.
    """
    assert 0 <= seed < 2**64
    stream_number = STREAMS[stream] if isinstance(stream, str) else stream
    assert 0 <= stream_number < 256
    assert 0 <= epoch < 2**32
    assert 0 <= first_block <= first_block + num_blocks <= _MAX_BLOCKS
    position = np.atleast_1d(np.asarray(positions)).astype(np.uint64)[:, None]  # (B, 1)
    blocks = np.arange(first_block, first_block + num_blocks, dtype=np.uint64)[None]
    counter = (
        blocks | np.uint64(stream_number * _MAX_BLOCKS),
        position & _WORD,
        position >> _SHIFT,
        np.full((1, 1), epoch, dtype=np.uint64),
    )
    words = philox(counter, (seed % 2**32, seed >> 32))
    return np.stack(np.broadcast_arrays(*words), axis=-1)


def uniforms(
    seed: int, epoch: int, positions: ArrayLike, stream: str | int, count: int
) -> NDArray[np.float64]:
    """Returns `count` uniform random numbers in [0, 1) for each position, (B, count) float64.

    The numbers of a position depend only on (seed, epoch, position, stream); a larger `count` only
    appends numbers. Two words of 32 bits make one number of 53 bits. The other arguments are those
    of `random_words`.
    """
    num_blocks = (count + 1) // 2
    words = random_words(seed, epoch, positions, stream, num_blocks=num_blocks)
    pairs = words.reshape(len(words), 2 * num_blocks, 2)  # (B, numbers, 2 words)
    numbers = (pairs[..., 0] << np.uint64(21)) | (pairs[..., 1] >> np.uint64(11))  # 32 + 21 bits
    return numbers[:, :count] * 2.0**-53


def drop_path_keep(
    rates: Sequence[float], seed: int, epoch: int, positions: ArrayLike
) -> torch.Tensor:
    """Draws which residual branches are kept in each sample, for drop path (stochastic depth).

    Branch i of a sample is kept with probability 1 - rates[i], independently of all others.

    Args:
        rates: Drop rate of each branch, in [0, 1], in execution order.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        positions: (B,), in the epoch's order, as an array or a tensor on the CPU.

    Returns: (num_branches, B) bool, True where a branch is kept, on the CPU.
    """
    draws = uniforms(seed, epoch, positions, "drop_path", len(rates))  # (B, num_sites)
    keep = draws >= np.asarray(rates, dtype=np.float64)
    return torch.from_numpy(np.ascontiguousarray(keep.T))

"""Masks of hidden patches; the mask of an image is a function of (seed, epoch, position) alone.

Here the position is that of the image in the epoch's order. Therefore neither a resume nor other
numbers of ranks or micro-batches change a mask.

Source: He et al. (MAE), arXiv 2111.06377 (random); Bao et al. (BEiT), arXiv 2106.08254, in the code
of EVA (blocks), and Peng et al. (BEiT v2), arXiv 2208.06366 (blocks, then single patches).
"""

from __future__ import annotations

import math
import random
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fd_large.data.random_numbers import random_words, uniforms
from fd_large.tasks.distillation.section import Mask

Grid = tuple[int, int]
Bools = NDArray[np.bool_]

_ATTEMPTS = 10
_LEAST_ASPECT = 0.3


def masks(mask: Mask, grid: Grid, seed: int, epoch: int, positions: ArrayLike) -> Bools:
    """Draws whether each patch of each image is hidden, (B, N) bool.

    Args:
        mask: The recipe's section `mask`.
        grid: Rows and columns of the patches.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        positions: (B,), positions of the images in the epoch's order.
    """
    numbers = _numbers_hidden(mask, grid, seed, epoch, positions)
    if mask.sampler == "random":
        noise = uniforms(seed, epoch, positions, "mask", grid[0] * grid[1])
        return random_masks(noise, numbers)
    words = random_words(seed, epoch, positions, "mask")[:, 0]
    exact = mask.sampler == "block_exact"
    drawn = partial(block_mask, grid=grid, min_patches=mask.min_patches, exact=exact)
    draws = (random.Random(int.from_bytes(row.astype("<u4").tobytes(), "little")) for row in words)
    pairs = zip(draws, numbers.tolist(), strict=True)
    return np.stack([drawn(draw, number=number) for draw, number in pairs])


def _numbers_hidden(
    mask: Mask, grid: Grid, seed: int, epoch: int, positions: ArrayLike
) -> NDArray[np.int64]:
    """Draws the number of hidden patches of each image, (B,); for arguments see `masks`.

    If `mask` states neither a range of ratios nor a share of images, all images have the same
    number. With the sampler `block` an image may have fewer hidden patches than this number.
    """
    if not mask.ratio_to and mask.share == 1:
        return np.full(np.shape(positions), hidden(mask, grid))
    drawn = uniforms(seed, epoch, positions, "mask_ratio", 2)
    ratios = mask.ratio + (max(mask.ratio_to, mask.ratio) - mask.ratio) * drawn[:, 0]
    numbers = [hidden(mask, grid, ratio) for ratio in ratios.tolist()]
    return np.where(drawn[:, 1] < mask.share, numbers, 0)


def hidden(mask: Mask, grid: Grid, ratio: float | None = None) -> int:
    """Returns the number of hidden patches of an image.

    With the sampler `block` an image may have fewer hidden patches than this number.

    Args:
        mask: The recipe's section `mask`.
        grid: Rows and columns of the patches.
        ratio: Share of the image's patches that are hidden; None for `mask.ratio`.
    """
    patches, ratio = grid[0] * grid[1], mask.ratio if ratio is None else ratio
    if mask.sampler == "random":
        # As published: 10 * (1 - 0.9) is just below 1 in floating point and rounds down to 0, so
        # that a ratio of 0.9 hides all of 10 patches.
        return patches - int(patches * (1 - ratio))
    return round(patches * ratio)


def random_masks(noise: NDArray[np.float64], numbers: ArrayLike) -> Bools:
    """Returns masks (B, N) bool that hide in each image the patches with the largest noise.

    Args:
        noise: (B, N), a random number for each patch.
        numbers: Number of hidden patches, as a single number for all images, or as (B,).
    """
    place = noise.argsort(axis=1, kind="stable").argsort(axis=1)
    masked: Bools = place >= noise.shape[1] - np.reshape(numbers, (-1, 1))
    return masked


def block_mask(
    draw: random.Random, grid: Grid, number: int, *, min_patches: int, exact: bool = False
) -> Bools:
    """Returns a mask (N,) bool that hides rectangles of patches, which may overlap.

    Random numbers are drawn in the same order as in the official code: area, aspect, top, left.

    Args:
        draw: Generator of random numbers.
        grid: Rows and columns of the patches.
        number: Largest number of hidden patches.
        min_patches: Smallest area of a rectangle, in patches. The area is drawn between this number
            and the number of patches that remain to be hidden, even if the latter is smaller.
        exact: Whether single patches are hidden too if the rectangles hide fewer than `number`.
    """
    masked = np.zeros(grid, dtype=np.bool_)
    left = number
    while left > 0 and (new := _hide_rectangle(draw, masked, min_patches, left)):
        left -= new
    flat = masked.reshape(-1)
    if exact and left:
        flat[draw.sample(np.flatnonzero(~flat).tolist(), left)] = True
    return flat


def _hide_rectangle(draw: random.Random, masked: Bools, least: int, most: int) -> int:
    """Draws a rectangle and hides its patches, in place.

    Args:
        draw: Generator of random numbers.
        masked: (H, W) bool, the mask, which is changed.
        least, most: Bounds of the rectangle's area in patches. The rectangle must also hide at most
            `most` patches that were not hidden before.

    Returns: the number of newly hidden patches; 0 if no rectangle was found in `_ATTEMPTS` tries.
    """
    rows, columns = masked.shape
    bound = math.log(_LEAST_ASPECT)
    for _ in range(_ATTEMPTS):
        area = draw.uniform(least, most)
        aspect = math.exp(draw.uniform(bound, -bound))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, left = draw.randint(0, rows - height), draw.randint(0, columns - width)
        rectangle = masked[top : top + height, left : left + width]
        new = int(rectangle.size - rectangle.sum())
        if 0 < new <= most:
            rectangle[:] = True
            return new
    return 0

"""Mixup and CutMix of the images of a global batch, which is divided into groups.

As in timm's `batch` mode, all images of a group (fd_large/data/mixing.py) have the same choice of
mixup or CutMix, the same share and the same box.

Sources: Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899; timm/data/mixup.py
(Apache-2.0).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large.data.mixing import mixed
from fd_large.data.random_numbers import uniforms

# Pairs of random numbers, of which the first accepted pair gives the share. At alpha = 2, the
# largest that recipes may have, one in six is accepted: all 128 fail once in 1e10 batches.
SHARE_TRIES = 128
MAX_ALPHA = 2.0


class Mix(NamedTuple):
    """How every image of a group is mixed with its partner.

    Attributes:
        share: Fraction of pixels and label that an image keeps; the rest comes from its partner.
        box: Top, bottom, left and right of the box that is filled from the partner (CutMix), or
            None if each pixel is a weighted mean (mixup).
    """

    share: float
    box: tuple[int, int, int, int] | None


UNMIXED = Mix(1.0, None)


def draw_mix(
    seed: int,
    epoch: int,
    first_position: int,
    *,
    image_size: int,
    mixup: float,
    cutmix: float,
    switch_probability: float,
) -> Mix:
    """Draws how a group is mixed.

    Args:
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        first_position: Position of the group's first image in the epoch's order.
        image_size: Side of the images, in pixels.
        mixup: Alpha of mixup's beta distribution; 0 turns mixup off.
        cutmix: Alpha of CutMix's beta distribution; 0 turns CutMix off.
        switch_probability: Probability of CutMix if both are on.

    Returns: how the group is mixed; if both are off, a `Mix` that leaves images unchanged.
    """
    if not (mixup or cutmix):
        return UNMIXED
    switch, top, left, *pairs = uniforms(
        seed, epoch, [first_position], "mixing", 3 + 2 * SHARE_TRIES
    )[0].tolist()
    cuts = bool(cutmix) and (not mixup or switch < switch_probability)
    share = beta_share(np.array(pairs), cutmix if cuts else mixup)
    if not cuts:
        return Mix(share, None)
    side = int(image_size * np.sqrt(1.0 - share))
    row, column = int(top * image_size), int(left * image_size)
    box = (*_clipped(row, side, image_size), *_clipped(column, side, image_size))
    area = (box[1] - box[0]) * (box[3] - box[2])
    return Mix(1.0 - area / image_size**2, box)


def beta_share(draws: NDArray[np.float64], alpha: float) -> float:
    """Returns a sample of Beta(alpha, alpha), or 0.5 if all tries were rejected.

    Args:
        draws: (2 * tries,), uniform random numbers in [0, 1), a pair for each try.
        alpha: Above 0, at most `MAX_ALPHA`.

    Source: Joehnk, "Erzeugung von betaverteilten und gammaverteilten Zufallszahlen", Metrika 1964.
    """
    assert 0 < alpha <= MAX_ALPHA
    x, y = draws[0::2] ** (1 / alpha), draws[1::2] ** (1 / alpha)
    accepted = np.flatnonzero((x + y <= 1) & (x + y > 0))
    if not len(accepted):
        return 0.5
    first = accepted[0]
    return float(x[first] / (x[first] + y[first]))


def mix_images(images: Tensor, others: Tensor, mix: Mix) -> Tensor:
    """Returns images (B, 3, H, W) float32 that are mixed with their partners.

    Args:
        images: (B, 3, H, W) float32, normalised, all of a single group.
        others: (B, 3, H, W) float32, the partner of each image.
        mix: How the group is mixed.
    """
    if mix.box is not None:
        top, bottom, left, right = mix.box
        cut = images.clone()
        cut[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        return cut
    return images if mix.share == 1.0 else mixed(images, others, mix.share)


def mix_labels(
    labels: Tensor, others: Tensor, mix: Mix, *, num_classes: int, smoothing: float
) -> Tensor:
    """Returns target distributions over the classes, smoothed and mixed like the images.

    Args:
        labels: (B,) int64, the class of each image of a group.
        others: (B,) int64, the class of each image's partner.
        mix: How the group is mixed.
        num_classes: Number of classes, K.
        smoothing: Probability that is spread evenly over all classes.

    Returns: (B, K) float32.
    """
    rest = smoothing / num_classes

    def smooth(of: Tensor) -> Tensor:
        rows = torch.full((len(of), num_classes), rest)
        return rows.scatter_(1, of[:, None], 1.0 - smoothing + rest)

    return smooth(labels) * mix.share + smooth(others) * (1.0 - mix.share)


def _clipped(middle: int, side: int, limit: int) -> tuple[int, int]:
    """Returns start and end of an interval in pixels, cut to 0..`limit`.

    Before it is cut, the interval has the length `side`, and `middle` is its centre.
    """
    return max(0, middle - side // 2), min(limit, middle + (side + 1) // 2)

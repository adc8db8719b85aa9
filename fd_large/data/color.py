"""Color of a view: jitter and grayscale, from numbers drawn by the caller."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import torch
from torchvision.transforms.v2 import functional as F

NUM_DRAWS = 6  # brightness, contrast, saturation, hue, order, grayscale
# SimCLR's proportion of the four: 0.8, 0.8, 0.8 and 0.2 times the strength.
HUE_SHARE = 0.25
_ORDERS = tuple(permutations(range(4)))


def jitter_color(
    image: torch.Tensor, draws: Sequence[float], *, strength: float, grayscale_probability: float
) -> torch.Tensor:
    """Changes brightness, contrast, saturation and hue in a random order, then perhaps to gray.

    The factors are uniform as in torchvision's ColorJitter(strength, strength, strength,
    strength / 4): brightness, contrast and saturation in 1 -+ strength, hue by -+ strength / 4 of
    the circle.

    Args:
        image: (3, H, W) uint8.
        draws: `NUM_DRAWS` numbers in [0, 1).
        strength: 0 (none) to 1.
        grayscale_probability: Probability of three equal channels, in [0, 1].

    Returns: (3, H, W) uint8.
    Source: Chen et al., "A simple framework for contrastive learning of visual representations",
        ICML 2020, appendix A.
    """
    *amounts, order, gray = draws
    if strength > 0:
        brightness, contrast, saturation, hue = (strength * (2 * draw - 1) for draw in amounts)
        steps = (
            lambda x: F.adjust_brightness(x, 1 + brightness),
            lambda x: F.adjust_contrast(x, 1 + contrast),
            lambda x: F.adjust_saturation(x, 1 + saturation),
            lambda x: F.adjust_hue(x, HUE_SHARE * hue),
        )
        for number in _ORDERS[int(order * len(_ORDERS))]:
            image = steps[number](image)
    if gray < grayscale_probability:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    return image

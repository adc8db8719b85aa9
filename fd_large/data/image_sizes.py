"""Draws the size of the images of each step, in a run with several image sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fd_large.data.random_numbers import uniforms


class ImageSizes(NamedTuple):
    """The image sizes of a run, of which each step draws one size for all of its images.

    The draw is a function of (seed, epoch, step of the epoch), so that all ranks, micro-batches
    and loading processes agree without communication, and a resumed run continues unchanged.

    Attributes:
        sides: Sides of the square images, in pixels.
        seed: The run's seed.
        global_batch_size: Number of images in a step, over all ranks.
    """

    sides: Sequence[int]
    seed: int
    global_batch_size: int

    def at(self, epoch: int, position: int) -> int:
        """Returns the side in pixels of the images of a step; each side is equally likely.

        The position is that of any image of the step in the epoch's order.
        """
        step = position // self.global_batch_size
        draw = float(uniforms(self.seed, epoch, [step], "image_size", 1)[0, 0])
        return self.sides[int(draw * len(self.sides))]

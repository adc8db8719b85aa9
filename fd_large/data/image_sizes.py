"""The size of a step's images in a run with several sizes, drawn for each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fd_large.data.random_numbers import uniforms


class ImageSizes(NamedTuple):
    """Image sizes; each step draws a size for all of its images.

    The draw is a function of (seed, epoch, step of the epoch), so that all ranks, micro-batches
    and loading processes agree without communication, and a resumed run continues unchanged.

    Attributes:
        sides: Sides of the square images, in pixels.
        seed: The run's seed.
        global_batch_size: Images a step, over all ranks.
    """

    sides: Sequence[int]
    seed: int
    global_batch_size: int

    def at(self, epoch: int, position: int) -> int:
        """Returns the side of the step at a position of an epoch; each side is equally likely."""
        step = position // self.global_batch_size
        draw = float(uniforms(self.seed, epoch, [step], "image_size", 1)[0, 0])
        return self.sides[int(draw * len(self.sides))]

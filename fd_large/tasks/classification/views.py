"""Random views of labelled images, by their positions in an epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large.data.labelled import LabelledImages
from fd_large.data.loader import load_views
from fd_large.data.random_numbers import uniforms
from fd_large.data.views import ViewSettings


class Labelled(NamedTuple):
    """Views of some positions.

    Attributes:
        images: (B, 3, S, S) uint8; black where no image could be used.
        indices: (B,) int64, the samples that were taken.
        labels: (B,) int64.
        bad: For each position the messages of samples that were tried and cannot be used.
    """

    images: Tensor
    indices: Tensor
    labels: Tensor
    bad: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class LabelledViews:
    """Loads views; what happens to an image is a function of (seed, epoch, position).

    Attributes:
        source: The images.
        settings: How an image becomes a view.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
    """

    source: LabelledImages
    settings: ViewSettings
    seed: int
    epoch: int

    def load(
        self,
        positions: NDArray[np.int64],
        change: Callable[[Tensor, int], Tensor] = lambda view, place: view,
    ) -> Labelled:
        """Loads the views of some positions.

        Args:
            positions: (B,) in the epoch's order.
            change: What else is done to a view, given which of the positions it is of.
        """
        loaded = load_views(
            self.source, positions, self.settings, change, seed=self.seed, epoch=self.epoch
        )
        labels = [self.source.label(index) for index in loaded.indices.tolist()]
        return Labelled(loaded.images, loaded.indices, torch.tensor(labels), loaded.bad)

    def draws(self, positions: NDArray[np.int64], stream: str, count: int) -> list[list[float]]:
        """Returns (B, count) numbers in [0, 1) of a stream."""
        return uniforms(self.seed, self.epoch, positions, stream, count).tolist()

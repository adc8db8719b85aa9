"""Random views of labelled images, by their positions in an epoch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large.data import views
from fd_large.data.labelled import LabelledImages
from fd_large.data.loader import load_samples
from fd_large.data.random_numbers import uniforms
from fd_large.data.sampler import samples_at


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
    settings: views.ViewSettings
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
        crops = self.draws(positions, "view", views.NUM_DRAWS)

        def view(place: int, index: int) -> Any:
            return change(views.random_view(self.source, index, crops[place], self.settings), place)

        loaded = load_samples(
            view,
            positions,
            samples_at(self.source, self.seed, self.epoch, positions),
            num_samples=len(self.source),
            seed=self.seed,
            epoch=self.epoch,
            blocks=getattr(self.source, "blocks", None),
        )
        black = torch.zeros(3, *[self.settings.image_size] * 2, dtype=torch.uint8)
        indices = [sample.index for sample in loaded]
        return Labelled(
            torch.stack([black if sample.value is None else sample.value for sample in loaded]),
            torch.tensor(indices),
            torch.tensor([self.source.label(index) for index in indices]),
            tuple(sample.bad for sample in loaded),
        )

    def draws(self, positions: NDArray[np.int64], stream: str, count: int) -> list[list[float]]:
        """Returns (B, count) numbers in [0, 1) of a stream."""
        return uniforms(self.seed, self.epoch, positions, stream, count).tolist()

"""Batches of images with labels: for training by position, for tests each image once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fd_large.data.loader import Batch, load_batches, load_samples
from fd_large.data.random_numbers import uniforms
from fd_large.data.sampler import epoch_order
from fd_large.data.suppress_stderr import suppress_stderr
from fd_large.errors import DataError
from fd_large.tasks.dense.geometry import padded, sizes_of
from fd_large.tasks.segmentation.data import photometric
from fd_large.tasks.segmentation.data.dataset import SegmentationSet
from fd_large.tasks.segmentation.data.target import Targets
from fd_large.tasks.segmentation.data.views import NUM_DRAWS, TestViews, TrainingViews
from fd_large.tasks.segmentation.loss import IGNORED


@dataclass(frozen=True)
class TrainingBatches(Dataset):
    """Positions to a `Batch` of square crops; runs in the workers.

    Attributes:
        source: Images with labels.
        views: How they are seen.
        seed: The run's seed.
        epoch: Counted from 0.
    """

    source: SegmentationSet
    views: TrainingViews
    seed: int
    epoch: int

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        """Loads the crops; a black one without labels stands where no sample can be used."""
        of = (self.seed, self.epoch, positions)
        draws = uniforms(*of, "jitter", NUM_DRAWS).tolist()
        colors = uniforms(*of, "color", photometric.NUM_DRAWS).tolist()

        def make(place: int, index: int) -> tuple[Tensor, NDArray[np.int16]]:
            return self.views.view(*self.source.sample(index), draws[place], colors[place])

        loaded = load_samples(
            make,
            positions,
            epoch_order(len(self.source), self.seed, self.epoch, positions),
            num_samples=len(self.source),
            seed=self.seed,
            epoch=self.epoch,
        )
        side = self.views.image_size
        black = torch.zeros(3, side, side, dtype=torch.uint8)
        nothing = black, np.full((side, side), IGNORED, np.int16)
        made = [sample.value or nothing for sample in loaded]
        images = [image for image, _ in made]
        labels = [torch.from_numpy(seen) for _, seen in made]
        return Batch(
            torch.stack([padded(image, (side, side)) for image in images]),
            self.epoch,
            torch.from_numpy(positions),
            torch.tensor([sample.index for sample in loaded]),
            sum((sample.bad for sample in loaded), ()),
            Targets(
                torch.stack([padded(seen, (side, side), IGNORED) for seen in labels]),
                sizes_of(images),
                positions,
                self.epoch,
            ),
        )


class TestImage(NamedTuple):
    """An image of a test.

    Attributes:
        views: (3, h, w) uint8 at each scale; none for an image that only fills up, or that could
            not be read.
        labels: (H, W) int16, classes or `IGNORED`, of the image in its own size.
        index: Its number in the dataset.
        bad: Why it could not be read; empty: it was.
    """

    # No test of pytest's.
    __test__ = False

    views: list[Tensor]
    labels: Tensor
    index: int
    bad: str = ""


@dataclass(frozen=True)
class TestImages(Dataset):
    """Numbers in a dataset, -1 for none, to `TestImage`; runs in the workers."""

    __test__ = False

    source: SegmentationSet
    views: TestViews

    def __getitem__(self, index: int) -> TestImage:
        """Reads an image, and its labels."""
        none = torch.full((1, 1), IGNORED, dtype=torch.int16)
        if index < 0:
            return TestImage([], none, index)
        try:
            with suppress_stderr():
                image, labels = self.source.sample(index)
        except DataError as error:
            return TestImage([], none, index, str(error))
        seen = [view.image(image) for view in self.views.views(*labels.shape)]
        return TestImage(seen, torch.from_numpy(labels), index)


def build_test_loader(
    source: SegmentationSet, views: TestViews, *, rank: int, world_size: int, workers: int
) -> DataLoader:
    """All images once over the ranks, as many on every rank, one by one.

    Args:
        source: Images with labels.
        views: At which sizes they are seen.
        rank: Counted from 0.
        world_size: The number of ranks.
        workers: Processes that load; 0: this one does.
    """
    rounds = -(-len(source) // world_size)
    places = np.arange(rounds) * world_size + rank
    mine = np.where(places < len(source), places, -1).tolist()
    return load_batches(TestImages(source, views), mine, workers=workers)

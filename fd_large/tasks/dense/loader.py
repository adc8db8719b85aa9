"""Loads images with a truth for each pixel: crops by position in training, each image in tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fd_large.data.loader import Batch, load_batches, load_samples
from fd_large.data.sampler import epoch_order
from fd_large.data.suppress_stderr import suppress_stderr
from fd_large.errors import DataError
from fd_large.tasks.dense.geometry import View, padded, sizes_of
from fd_large.tasks.dense.pairs import PairedImages
from fd_large.tasks.dense.target import Targets


class TrainingViews(Protocol):
    """Views of training images."""

    @property
    def image_size(self) -> int:
        """Side of the square that views are padded to, in pixels."""

    @property
    def unknown(self) -> np.number[Any]:
        """Returns the target of an unknown pixel."""

    def draws(self, seed: int, epoch: int, positions: NDArray[np.int64]) -> Sequence[Any]:
        """Draws the random numbers of the view at each position."""

    def view(self, image: Tensor, truth: NDArray[Any], drawn: Any) -> tuple[Tensor, NDArray[Any]]:
        """Returns a view of an image, (3, h, w) uint8, and the truth of its pixels, (h, w).

        Args:
            image: (3, H, W) uint8.
            truth: (H, W).
            drawn: An item of `draws`.
        """


@dataclass(frozen=True)
class TrainingBatches(Dataset):
    """Maps positions to a `Batch` of square crops; runs in the workers.

    Attributes:
        source: Images with their truth.
        views: Views of the images.
        seed: The run's seed.
        epoch: Counted from 0.
    """

    source: PairedImages
    views: TrainingViews
    seed: int
    epoch: int

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        """Loads the crops; a black crop with unknown truth replaces an unusable sample."""
        drawn = self.views.draws(self.seed, self.epoch, positions)
        loaded = load_samples(
            lambda place, index: self.views.view(*self.source.sample(index), drawn[place]),
            positions,
            epoch_order(len(self.source), self.seed, self.epoch, positions),
            num_samples=len(self.source),
            seed=self.seed,
            epoch=self.epoch,
            name=self.source.__getitem__,
        )
        side = self.views.image_size
        black = torch.zeros(3, side, side, dtype=torch.uint8)
        nothing = black, np.full((side, side), self.views.unknown)
        samples = [sample.value or nothing for sample in loaded]
        images = [image for image, _ in samples]
        unknown = self.views.unknown.item()
        return Batch(
            torch.stack([padded(image, (side, side)) for image in images]),
            self.epoch,
            torch.from_numpy(positions),
            torch.tensor([sample.index for sample in loaded]),
            sum((sample.bad for sample in loaded), ()),
            Targets(
                torch.stack(
                    [padded(torch.from_numpy(truth), (side, side), unknown) for _, truth in samples]
                ),
                sizes_of(images),
                positions,
                self.epoch,
            ),
        )


class TestViews(Protocol):
    """The sizes at which images are tested."""

    __test__ = False

    def views(self, height: int, width: int) -> list[View]:
        """Returns the views of an image of this size."""

    def num_forwards(self, height: int, width: int, at_once: int) -> int:
        """Returns the number of forwards for an image, with `at_once` windows in each."""


class TestImage(NamedTuple):
    """A test image with its views and its truth.

    Attributes:
        views: (3, h, w) uint8 at each size; empty for a padding image, or one that could not be
            read.
        truth: (H, W), of the image in its own size.
        index: Index in the dataset.
        bad: Reason that the image could not be read, or "".
    """

    # No test of pytest's.
    __test__ = False

    views: list[Tensor]
    truth: Tensor
    index: int
    bad: str = ""


@dataclass(frozen=True)
class TestImages(Dataset):
    """Maps indices in a dataset (-1 for padding) to `TestImage`; runs in the workers."""

    __test__ = False

    source: PairedImages
    views: TestViews

    def __getitem__(self, index: int) -> TestImage:
        """Reads an image, and its truth."""
        none = torch.zeros(1, 1)
        if index < 0:
            return TestImage([], none, index)
        try:
            with suppress_stderr():
                image, truth = self.source.sample(index)
        except DataError as error:
            return TestImage([], none, index, str(error))
        views = [view.image(image) for view in self.views.views(*truth.shape)]
        return TestImage(views, torch.from_numpy(truth), index)


def build_test_loader(
    source: PairedImages, views: TestViews, *, rank: int, world_size: int, workers: int
) -> DataLoader:
    """Returns a loader of this rank's share of the images; all ranks' shares have equal length.

    Args:
        source: Images with their truth.
        views: Views of the images.
        rank: Counted from 0.
        world_size: The number of ranks.
        workers: Number of loading processes; 0 loads in this process.
    """
    mine = deal(len(source), batch_size=1, rank=rank, world_size=world_size)
    numbers = [int(batch[0]) for batch in mine]
    return load_batches(TestImages(source, views), numbers, workers=workers)


def deal(
    num_images: int, *, batch_size: int, rank: int, world_size: int
) -> list[NDArray[np.int64]]:
    """Returns a rank's batches of positions in an order of images, padded with -1.

    Consecutive batches go to the ranks in turn, so that all ranks work about as long.
    """
    share = -(-num_images // (batch_size * world_size)) * batch_size * world_size
    places = np.where(np.arange(share) < num_images, np.arange(share), -1)
    return list(places.reshape(-1, world_size, batch_size)[:, rank])

"""Loads images with the truth of each pixel, as random crops in training or whole in tests."""

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
    """Makes random views of training images and their truth."""

    @property
    def image_size(self) -> int:
        """Side of the square to which views are padded, in pixels."""

    @property
    def unknown(self) -> np.number[Any]:
        """The target of a pixel whose class or depth is unknown."""

    def draws(self, seed: int, epoch: int, positions: NDArray[np.int64]) -> Sequence[Any]:
        """Returns an item of random numbers for each position in the epoch's order.

        Args:
            seed: The run's seed.
            epoch: Epoch, counted from 0.
            positions: (B,), positions in the epoch's order.
        """

    def view(self, image: Tensor, truth: NDArray[Any], drawn: Any) -> tuple[Tensor, NDArray[Any]]:
        """Returns a view of an image, (3, h, w) uint8, and the truth of its pixels, (h, w).

        Args:
            image: (3, H, W) uint8.
            truth: (H, W), the class or depth of each pixel.
            drawn: An item of the result of `draws`.
        """


@dataclass(frozen=True)
class TrainingBatches(Dataset):
    """Dataset whose item for positions in the epoch's order is a `Batch` of square crops.

    The loading processes use the dataset.

    Attributes:
        source: Images with their truth.
        views: Makes the views of the images.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
    """

    source: PairedImages
    views: TrainingViews
    seed: int
    epoch: int

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        """Loads the crops at positions (B,) in the epoch's order.

        If no image can be used at a position, the crop is black and its truth is unknown.
        """
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
    """Decides the sizes at which a test image is predicted."""

    __test__ = False

    def views(self, height: int, width: int) -> list[View]:
        """Returns the views of an image that has the given height and width in pixels."""

    def num_forwards(self, height: int, width: int, at_once: int) -> int:
        """Returns the number of forwards that predict an image.

        Args:
            height: Height of the image, in pixels.
            width: Width of the image, in pixels.
            at_once: Largest number of windows in a forward.
        """


class TestImage(NamedTuple):
    """A test image with its views and its truth.

    Attributes:
        views: (3, h, w) uint8 for each size; empty for padding, or if the image could not be read.
        truth: (H, W), the class or depth of each pixel of the image in its own size.
        index: Index in the dataset; -1 for padding.
        bad: Reason that the image could not be read; "" if it could be read, and for padding.
    """

    # No test of pytest's.
    __test__ = False

    views: list[Tensor]
    truth: Tensor
    index: int
    bad: str = ""


@dataclass(frozen=True)
class TestImages(Dataset):
    """Dataset whose item for an image's index, or -1 for padding, is a `TestImage`.

    The loading processes use the dataset.

    Attributes:
        source: Images with their truth.
        views: The sizes at which images are tested.
    """

    __test__ = False

    source: PairedImages
    views: TestViews

    def __getitem__(self, index: int) -> TestImage:
        """Reads image `index` and its truth, and makes the views of the image.

        If the image or its truth cannot be read, the result has no views, and the reason is in its
        field `bad`. If `index` is -1, the result is padding, without views and truth.
        """
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
    """Returns a loader of a rank's part of the test images; all parts have the same length.

    Args:
        source: Images with their truth.
        views: The sizes at which images are tested.
        rank: The rank, counted from 0.
        world_size: Number of ranks.
        workers: Number of loading processes; 0 loads in this process.
    """
    mine = deal(len(source), batch_size=1, rank=rank, world_size=world_size)
    numbers = [int(batch[0]) for batch in mine]
    return load_batches(TestImages(source, views), numbers, workers=workers)


def deal(
    num_images: int, *, batch_size: int, rank: int, world_size: int
) -> list[NDArray[np.int64]]:
    """Returns a rank's batches of the indices 0 to `num_images` - 1, padded with -1.

    Consecutive batches go to the ranks in turn, so that all ranks work for about the same time.

    Args:
        num_images: Number of images.
        batch_size: Number of indices of a batch.
        rank: The rank, counted from 0.
        world_size: Number of ranks.
    """
    share = -(-num_images // (batch_size * world_size)) * batch_size * world_size
    places = np.where(np.arange(share) < num_images, np.arange(share), -1)
    return list(places.reshape(-1, world_size, batch_size)[:, rank])

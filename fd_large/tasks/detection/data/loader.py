"""Batches of images with their objects: for training by position, for evaluation each once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fd_large.data.decode import MAX_PIXELS, decode
from fd_large.data.loader import Batch, build_loader, load_batches, load_samples
from fd_large.data.random_numbers import uniforms
from fd_large.data.sampler import Portion, epoch_order
from fd_large.data.suppress_stderr import suppress_stderr
from fd_large.errors import ConfigError, DataError
from fd_large.tasks.detection.data.annotations import CocoSet
from fd_large.tasks.detection.data.sampler import grouped_order
from fd_large.tasks.detection.data.views import NUM_DRAWS, Jitter, make_target, resized_view
from fd_large.tasks.detection.heads.target import Target, Targets

# Side of the black image without objects that stands where no sample was usable.
BLACK_SIDE = 32


def build_training_loader(
    source: CocoSet,
    jitter: Jitter,
    portion: Portion,
    *,
    seed: int,
    global_batch_size: int,
    workers: int,
    max_pixels: int = MAX_PIXELS,
) -> DataLoader:
    """The rest of an epoch for one rank.

    Args:
        source: Images and objects.
        jitter: Draws the views; where they keep their own sizes, a global batch holds images of
            one orientation, and a batch is padded to its largest.
        portion: Which micro batches.
        seed: The run's seed.
        global_batch_size: Images a step over all ranks.
        workers: Number of loading processes; 0 loads in this one.
        max_pixels: Larger images are refused before they are decoded.

    Returns: an iterable of `Batch`: images (B, 3, H, W) uint8, padded with black at the right and
        the bottom, and `Targets`. The same samples on any number of ranks and workers.
    Raises:
        ConfigError: if batch sizes do not divide.
        DataError: if the global batch is larger than the data set.
    """
    order = None
    if jitter.canvas is None:
        order = grouped_order(source.landscape(), seed, portion.epoch, global_batch_size)
    return build_loader(
        _Samples(source, jitter, order, seed, portion.epoch, max_pixels),
        len(source),
        portion,
        global_batch_size=global_batch_size,
        workers=workers,
    )


@dataclass(frozen=True)
class _Samples(Dataset):
    """Positions to a `Batch`; runs in the workers."""

    source: CocoSet
    jitter: Jitter
    order: NDArray[np.int64] | None
    seed: int
    epoch: int
    max_pixels: int

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        if self.order is None:
            indices = epoch_order(len(self.source), self.seed, self.epoch, positions)
        else:
            indices = self.order[positions]
        draws = uniforms(self.seed, self.epoch, positions, "jitter", NUM_DRAWS).tolist()
        loaded = load_samples(
            lambda place, index: self._sample(index, draws[place]),
            positions,
            indices,
            num_samples=len(self.source),
            seed=self.seed,
            epoch=self.epoch,
        )
        made = [sample.value or self._black(sample.index) for sample in loaded]
        images, targets = [image for image, _ in made], [target for _, target in made]
        canvas = self.jitter.canvas or _largest(images)
        return Batch(
            _padded(images, canvas),
            self.epoch,
            torch.from_numpy(positions),
            torch.tensor([sample.index for sample in loaded]),
            sum((sample.bad for sample in loaded), ()),
            Targets(
                [target._replace(masks=_on_canvas(target.masks, canvas)) for target in targets],
                _sizes(images),
                torch.from_numpy(positions),
                self.epoch,
            ),
        )

    def _sample(self, index: int, draws: list[float]) -> tuple[Tensor, Target]:
        image = read_image(self.source, index, self.max_pixels)
        view = self.jitter.view(*image.shape[-2:], draws)
        target = make_target(self.source.objects(index), view, self.jitter.canvas or view.size)
        return view.image(image), target

    def _black(self, index: int) -> tuple[Tensor, Target]:
        image = torch.zeros(3, BLACK_SIDE, BLACK_SIDE, dtype=torch.uint8)
        nothing = Target(
            boxes=torch.zeros(0, 4),
            labels=torch.zeros(0, dtype=torch.int64),
            masks=torch.zeros(0, 0, 0, dtype=torch.uint8),
            crowd_boxes=torch.zeros(0, 4),
            image_id=self.source.image_id(index),
        )
        return image, nothing


class EvaluationBatch(NamedTuple):
    """Some images of an evaluation.

    Attributes:
        images: (B, 3, H, W) uint8, padded with black at the right and the bottom.
        sizes: (B, 2) int64, height and width of each image without its padding.
        original_sizes: (B, 2) int64, height and width of the images.
        indices: (B,) int64, their numbers in the set.
        weights: (B,) float32: 0 of what only fills up the batch, or could not be read; else 1.
        bad: What is wrong with those that could not be read.
    """

    images: Tensor
    sizes: Tensor
    original_sizes: Tensor
    indices: Tensor
    weights: Tensor
    bad: tuple[str, ...]


def build_evaluation_loader(
    source: CocoSet,
    *,
    short_side: int,
    long_side: int,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    max_pixels: int = MAX_PIXELS,
) -> DataLoader:
    """All images once over the ranks, in batches of one size, as many on every rank.

    Images of one orientation lie side by side, which saves padding. Where they do not come out
    even, a rank's last batches are filled with images of weight 0: under ZeRO-3 every rank must
    run as many forwards as the others.

    Args:
        source: Images.
        short_side: Length of the shorter side, in pixels.
        long_side: Most that the longer side may become.
        batch_size: Images a batch.
        rank: Counted from 0.
        world_size: The number of ranks.
        workers: Processes that load; 0: this one does.
        max_pixels: Larger images are refused before they are decoded.

    Raises: ConfigError: for sizes that are none.
    """
    if batch_size < 1 or short_side < 1 or long_side < short_side:
        raise ConfigError(
            f"detection: no evaluation of such sizes; got batches of {batch_size}, a short side of "
            f"{short_side} and a long side of at most {long_side}, expected 1 or more, and a long "
            "side not below the short one. Set for example 1, 800 and 1333."
        )
    assert 0 <= rank < world_size
    order = np.argsort(~source.landscape(), kind="stable")
    batches = deal(len(order), batch_size=batch_size, rank=rank, world_size=world_size)
    pictures = _Pictures(source, order, short_side, long_side, max_pixels)
    return load_batches(pictures, _Listed(batches), workers=workers)


def deal(
    num_images: int, *, batch_size: int, rank: int, world_size: int
) -> list[NDArray[np.int64]]:
    """A rank's batches of places in an order of images; -1 where there is none left.

    Consecutive batches go to the ranks in turn, so that all are about as long at work.
    """
    share = -(-num_images // (batch_size * world_size)) * batch_size * world_size
    places = np.where(np.arange(share) < num_images, np.arange(share), -1)
    return list(places.reshape(-1, world_size, batch_size)[:, rank])


@dataclass(frozen=True)
class _Pictures(Dataset):
    """Places in the order to an `EvaluationBatch`; runs in the workers."""

    source: CocoSet
    order: NDArray[np.int64]
    short_side: int
    long_side: int
    max_pixels: int

    def __getitem__(self, places: NDArray[np.int64]) -> EvaluationBatch:
        # A filler shows the first image: it is as good as any other.
        indices = self.order[np.maximum(places, 0)]
        weights = (places >= 0).astype(np.float32)
        images, bad = [], []
        with suppress_stderr():
            for place, index in enumerate(indices.tolist()):
                size = self.source.size(index)
                view = resized_view(*size, short_side=self.short_side, long_side=self.long_side)
                if not weights[place]:
                    images.append(torch.zeros(3, *view.size, dtype=torch.uint8))
                    continue
                try:
                    images.append(view.image(read_image(self.source, index, self.max_pixels)))
                except DataError as error:
                    bad.append(str(error))
                    weights[place] = 0
                    images.append(torch.zeros(3, *view.size, dtype=torch.uint8))
        return EvaluationBatch(
            _padded(images, _largest(images)),
            _sizes(images),
            torch.tensor([self.source.size(index) for index in indices.tolist()]),
            torch.from_numpy(indices),
            torch.from_numpy(weights),
            tuple(bad),
        )


class _Listed(Sampler):
    """Batches that are known beforehand."""

    def __init__(self, batches: Iterable[NDArray[np.int64]]) -> None:
        self._batches = list(batches)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return iter(self._batches)


def read_image(source: CocoSet, index: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """A picture's pixels, (3, H, W) uint8, of the size that its annotations were drawn on.

    Raises: DataError: if it cannot be read or decoded, or has another size.
    """
    image = decode(source.read(index), source[index], max_pixels=max_pixels)
    if tuple(image.shape[-2:]) != source.size(index):
        height, width = source.size(index)
        raise DataError(
            f"{source[index]}: not the image that was annotated; got {image.shape[-1]} x "
            f"{image.shape[-2]} pixels, expected {width} x {height}. Fetch the original again."
        )
    return image


def _largest(images: list[Tensor]) -> tuple[int, int]:
    return max(image.shape[-2] for image in images), max(image.shape[-1] for image in images)


def _sizes(images: list[Tensor]) -> Tensor:
    return torch.tensor([image.shape[-2:] for image in images])


def _padded(images: list[Tensor], canvas: tuple[int, int]) -> Tensor:
    padded = torch.zeros(len(images), 3, *canvas, dtype=torch.uint8)
    for place, image in enumerate(images):
        padded[place, :, : image.shape[-2], : image.shape[-1]] = image
    return padded


def _on_canvas(masks: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Masks (n, h, w) padded to the canvas; those of a set without masks stay (n, 0, 0)."""
    if tuple(masks.shape[1:]) == canvas or (len(masks) and not masks.numel()):
        return masks
    padded = torch.zeros(len(masks), *canvas, dtype=torch.uint8)
    padded[:, : masks.shape[1], : masks.shape[2]] = masks
    return padded

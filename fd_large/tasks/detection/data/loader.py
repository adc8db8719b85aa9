"""Loads batches of images: for training with their objects, and for evaluation each image once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fd_large.data.decode import decode
from fd_large.data.image_header import MAX_PIXELS
from fd_large.data.loader import Batch, build_loader, load_batches, load_samples
from fd_large.data.random_numbers import uniforms
from fd_large.data.sampler import Portion, epoch_order
from fd_large.data.suppress_stderr import suppress_stderr
from fd_large.errors import DataError
from fd_large.tasks.dense.geometry import padded, resized_view, sizes_of
from fd_large.tasks.dense.loader import deal
from fd_large.tasks.detection.data.annotations import CocoSet
from fd_large.tasks.detection.data.copy_instances import DRAWS_PER_OBJECT, copy_instances
from fd_large.tasks.detection.data.target import (
    SEMANTIC_STRIDE,
    Target,
    Targets,
    make_target,
    nothing,
)
from fd_large.tasks.detection.data.views import NUM_DRAWS, Jitter

# Side in pixels of the black image without objects that replaces an unusable sample.
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
    semantic_classes: int = 0,
    copy_probability: float = 0.0,
) -> DataLoader:
    """Returns a loader of one rank's micro-batches, from a given step to the end of an epoch.

    Args:
        source: Images and objects.
        jitter: Random resizing of the images. If it has no canvas, a global batch holds images of
            one orientation, and each micro-batch is padded to its largest image.
        portion: The epoch, the step to start from, and this rank's share of each global batch.
        seed: The run's seed.
        global_batch_size: Images per step over all ranks.
        workers: Number of loading processes; 0 loads in this process.
        max_pixels: Largest number of pixels of an image. A larger image is not decoded, and another
            image takes its place.
        semantic_classes: Number of classes of the semantic maps in the targets; 0 for no maps.
        copy_probability: Probability that the objects of an image are moved (`copy_instances`).

    Returns: an iterable of `Batch`, with images (B, 3, H, W) uint8, padded with black at the right
        and the bottom, and with `Targets`. The samples do not depend on the number of ranks or
        workers.
    Raises:
        ConfigError: if the global batch size is not a multiple of the micro-batch size times the
            number of ranks.
        DataError: if the global batch is larger than the dataset.
    """
    order = None
    if jitter.canvas is None:
        order = grouped_order(source.landscape(), seed, portion.epoch, global_batch_size)
    return build_loader(
        _Samples(
            source,
            jitter,
            order,
            seed,
            portion.epoch,
            max_pixels,
            semantic_classes,
            copy_probability,
        ),
        len(source),
        portion,
        global_batch_size=global_batch_size,
        workers=workers,
    )


def grouped_order(
    landscape: NDArray[np.bool_], seed: int, epoch: int, global_batch_size: int
) -> NDArray[np.int64]:
    """Returns an epoch's order of samples in which each global batch has images of one orientation.

    Padding wide and high images to one size would waste up to half of a batch. The samples of the
    epoch's random order are therefore divided into a wide and a high group. As soon as a group has
    G samples, they form the next global batch. The number of global batches must still be N // G.
    If the remainders of the two groups together would fill a batch, the larger remainder is filled
    up with the first samples of its group, which then occur twice in the epoch.

    Args:
        landscape: (N,), whether each sample is at least as wide as high.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        global_batch_size: Images per step over all ranks, G.

    Returns: (N // G * G,) sample indices, the same for any number of ranks.
    """
    order = epoch_order(len(landscape), seed, epoch, np.arange(len(landscape)))
    piles = [np.flatnonzero(landscape[order]), np.flatnonzero(~landscape[order])]
    batches: list[tuple[int, NDArray[np.int64]]] = []
    for pile in piles:  # A pile holds positions in `order`.
        whole = len(pile) // global_batch_size * global_batch_size
        for batch in pile[:whole].reshape(-1, global_batch_size):
            batches.append((int(batch[-1]), batch))
    if len(batches) < len(order) // global_batch_size:
        rest, pile = max(
            ((len(pile) % global_batch_size, pile) for pile in piles), key=lambda pair: pair[0]
        )
        again = np.resize(pile, global_batch_size - rest)
        batches.append((len(order), np.concatenate([pile[len(pile) - rest :], again])))
    batches.sort(key=lambda pair: pair[0])
    return order[np.concatenate([batch for _, batch in batches])]


@dataclass(frozen=True)
class _Samples(Dataset):
    """Dataset whose item for B positions in the epoch's order, an array (B,), is a `Batch`.

    The loading processes use the dataset. `order` has the index of the image at each position; it
    is None if the order is that of `epoch_order`. The other fields are arguments of
    `build_training_loader`, and `epoch` is the epoch, counted from 0.
    """

    source: CocoSet
    jitter: Jitter
    order: NDArray[np.int64] | None
    seed: int
    epoch: int
    max_pixels: int
    semantic_classes: int
    copy_probability: float

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        if self.order is None:
            indices = epoch_order(len(self.source), self.seed, self.epoch, positions)
        else:
            indices = self.order[positions]
        draws = uniforms(self.seed, self.epoch, positions, "jitter", NUM_DRAWS).tolist()
        loaded = load_samples(
            lambda place, index: self._sample(index, int(positions[place]), draws[place]),
            positions,
            indices,
            num_samples=len(self.source),
            seed=self.seed,
            epoch=self.epoch,
            name=self.source.__getitem__,
        )
        black = torch.zeros(3, BLACK_SIDE, BLACK_SIDE, dtype=torch.uint8)
        samples = [
            sample.value or (black, nothing(self.source.image_id(sample.index)))
            for sample in loaded
        ]
        images, targets = [image for image, _ in samples], [target for _, target in samples]
        sizes = sizes_of(images)
        canvas = self.jitter.canvas or tuple(sizes.amax(0).tolist())
        return Batch(
            torch.stack([padded(image, canvas) for image in images]),
            self.epoch,
            torch.from_numpy(positions),
            torch.tensor([sample.index for sample in loaded]),
            sum((sample.bad for sample in loaded), ()),
            Targets(
                [target._replace(masks=_on_canvas(target.masks, canvas)) for target in targets],
                sizes,
                positions,
                self.epoch,
            ),
        )

    def _sample(self, index: int, position: int, draws: list[float]) -> tuple[Tensor, Target]:
        image = read_image(self.source, index, self.max_pixels)
        objects, classes = self.source.objects(index), None
        if self.semantic_classes:
            classes = self.source.semantic(index, self.semantic_classes)
        if self.copy_probability:
            count = len(objects.boxes) * DRAWS_PER_OBJECT
            first, *rest = uniforms(self.seed, self.epoch, [position], "copies", 1 + count)[0]
            if first < self.copy_probability:
                rest = np.reshape(rest, (-1, DRAWS_PER_OBJECT))
                image, objects, classes = copy_instances(image, objects, rest, classes)
        view = self.jitter.view(*image.shape[-2:], draws)
        target = make_target(objects, view, self.jitter.canvas or view.size)
        if classes is not None:
            every = view.numbers(classes)[::SEMANTIC_STRIDE, ::SEMANTIC_STRIDE].astype(np.uint8)
            target = target._replace(semantic=torch.from_numpy(every))
        return view.image(image), target


def _on_canvas(masks: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Pads masks (n, h, w) with zeros, at right and bottom, to the size of a canvas.

    Args:
        masks: (n, h, w) uint8. Masks (n, 0, 0) with n > 0, which a dataset without masks has, are
            returned unchanged.
        canvas: Height and width of the result.
    """
    return masks if len(masks) and not masks.numel() else padded(masks, canvas)


class EvaluationBatch(NamedTuple):
    """A batch of images of an evaluation.

    Attributes:
        images: For each scale, the images, (B, 3, H, W) uint8, padded with black at the right and
            the bottom.
        sizes: For each scale, height and width of each image without its padding, (B, 2) int64.
        original_sizes: (B, 2) int64, height and width of the images in their files.
        indices: (B,) int64, indices of the images in the dataset.
        weights: (B,) float32, 1 for images that count; 0 for unreadable images and for images that
            only fill up the batch.
        bad: The error message of each unreadable image.
    """

    images: tuple[Tensor, ...]
    sizes: tuple[Tensor, ...]
    original_sizes: Tensor
    indices: Tensor
    weights: Tensor
    bad: tuple[str, ...]


def build_evaluation_loader(
    source: CocoSet,
    *,
    sides: Sequence[tuple[int, int]],
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    max_pixels: int = MAX_PIXELS,
) -> DataLoader:
    """Returns a loader of one rank's share of the test images, as `EvaluationBatch`es.

    Images of one orientation are adjacent, which saves padding. All ranks get the same number of
    batches, because under ZeRO-3 every rank must run the same number of forwards. The last batches
    are therefore filled up with images of weight 0.

    Args:
        source: The images.
        sides: For each scale, the length of the shorter side and the upper limit of the longer
            side, in pixels.
        batch_size: Images per batch.
        rank: The rank, counted from 0.
        world_size: The number of ranks.
        workers: Number of loading processes; 0 loads in this process.
        max_pixels: Largest number of pixels of an image. A larger image is not decoded, and counts
            as unreadable.
    """
    assert batch_size > 0
    assert all(0 < short <= long for short, long in sides)
    assert 0 <= rank < world_size
    order = np.argsort(~source.landscape(), kind="stable")
    batches = deal(len(order), batch_size=batch_size, rank=rank, world_size=world_size)
    images = _Resized(source, order, tuple(sides), max_pixels)
    return load_batches(images, batches, workers=workers)


@dataclass(frozen=True)
class _Resized(Dataset):
    """Dataset whose item for B positions in the array `order` is an `EvaluationBatch`.

    `order` has the images' indices in the order of the evaluation. The position -1 stands for an
    image that only fills up the batch. The other fields are arguments of `build_evaluation_loader`.
    The loading processes use the dataset.
    """

    source: CocoSet
    order: NDArray[np.int64]
    sides: tuple[tuple[int, int], ...]
    max_pixels: int

    def __getitem__(self, places: NDArray[np.int64]) -> EvaluationBatch:
        # A padding image has the size of the first image, which is as good as any other.
        indices = self.order[np.maximum(places, 0)]
        weights = (places >= 0).astype(np.float32)
        at_scales: list[list[Tensor]] = [[] for _ in self.sides]
        bad = []
        with suppress_stderr():
            for place, index in enumerate(indices.tolist()):
                size = self.source.size(index)
                image = None
                if weights[place]:
                    try:
                        image = read_image(self.source, index, self.max_pixels)
                    except DataError as error:
                        bad.append(str(error))
                        weights[place] = 0
                for images, (short, long) in zip(at_scales, self.sides, strict=True):
                    view = resized_view(*size, short_side=short, long_side=long)
                    black = torch.zeros(3, *view.size, dtype=torch.uint8)
                    images.append(black if image is None else view.image(image))
        sizes = tuple(map(sizes_of, at_scales))
        return EvaluationBatch(
            tuple(
                torch.stack([padded(image, tuple(size.amax(0).tolist())) for image in images])
                for images, size in zip(at_scales, sizes, strict=True)
            ),
            sizes,
            torch.tensor([self.source.size(index) for index in indices.tolist()]),
            torch.from_numpy(indices),
            torch.from_numpy(weights),
            tuple(bad),
        )


def read_image(source: CocoSet, index: int, max_pixels: int = MAX_PIXELS) -> Tensor:
    """Reads the pixels of image `index`, (3, H, W) uint8.

    Raises:
        DataError: if the image cannot be read or decoded, has more than `max_pixels`, or has
            another size than its annotation.
    """
    image = decode(source.read(index), source[index], max_pixels=max_pixels)
    if tuple(image.shape[-2:]) != source.size(index):
        height, width = source.size(index)
        raise DataError(
            f"{source[index]}: not the annotated image; got {image.shape[-1]} x "
            f"{image.shape[-2]} pixels, expected {width} x {height}. Fetch the original again."
        )
    return image

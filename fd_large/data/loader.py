"""The micro batches of a rank, in order, from any step of an epoch to its end.

Workers get positions and do the rest: the order of the epoch, reading, decoding, the view. So
nothing that a worker knows beforehand can change a pixel, and only positions travel to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from fd_large.data import color, views
from fd_large.data.decode import MAX_PIXELS, decode, size_before_decoding
from fd_large.data.random_numbers import uniforms
from fd_large.data.sampler import (
    check_batch_sizes,
    epoch_order,
    rank_positions,
    updates_per_epoch,
)
from fd_large.data.source import ImageSource
from fd_large.data.suppress_stderr import suppress_stderr
from fd_large.data.worker import start_worker
from fd_large.errors import ConfigError, DataError

# Images tried for one place in a batch; where all are bad, so is the data set.
MAX_TRIES = 10

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Views of some samples, and where in the run they belong.

    `images` is (B, 3, S, S) uint8; `positions` (B,) int64 are places in the epoch's order,
    `indices` (B,) int64 the samples that were taken for them; `bad` says of each sample that was
    tried and cannot be used what is wrong with it, its name first (`bad_images.py` counts them).
    `targets` is what a task learns from besides: tensors, in lists, tuples or dicts; or None.
    """

    images: torch.Tensor
    epoch: int
    positions: torch.Tensor
    indices: torch.Tensor
    bad: tuple[str, ...] = ()
    targets: Any = None

    def to(self, device: torch.device | str) -> Batch:
        """Copies images and targets without waiting for it.

        Positions and indices stay on the CPU: draws are made there, and reading them back from a
        device would stop the host.
        """
        return self._through(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Moves them to page-locked memory; the torch DataLoader calls this."""
        return self._through(torch.Tensor.pin_memory)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields what `to` copies."""
        yield self.images
        yield from _tensors(self.targets)

    def _through(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        return replace(self, images=move(self.images), targets=_mapped(move, self.targets))


def build_loader(
    source: ImageSource,
    *,
    seed: int,
    epoch: int,
    first_update: int = 0,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    image_size: int,
    min_crop_scale: float,
    workers: int,
    color_jitter: float = 0.0,
    grayscale_probability: float = 0.0,
    max_pixels: int = MAX_PIXELS,
) -> DataLoader:
    """The rest of an epoch for one rank: `micro batches a step` batches for each step.

    Args:
        source: The images.
        seed: The run's seed.
        epoch: Counted from 0.
        first_update: Of this epoch, counted from 0; where a resumed run goes on.
        global_batch_size: Images a step over all ranks.
        micro_batch_size: Images a batch.
        rank: Counted from 0.
        world_size: The number of ranks.
        image_size: Side of a view, in pixels.
        min_crop_scale: Smallest crop area, as a part of the picture's.
        workers: Processes that load; 0: this one does.
        color_jitter: Strength, 0 (none) to 1; `color.jitter_color`.
        grayscale_probability: Of a view without color.
        max_pixels: Larger images are refused before they are decoded.

    Returns: an iterable of `Batch`. An image that cannot be read or decoded is replaced by
        another, the same whatever the ranks and workers, and told in `Batch.bad`.
    Raises:
        ConfigError: if batch sizes do not divide or a number is out of range.
        DataError: if the global batch is larger than the data set.
    """
    positions = micro_batches(
        len(source),
        first_update=first_update,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world_size=world_size,
    )
    if image_size < 1:
        raise ConfigError(
            f"data.image_size: not a size; got {image_size}, expected 1 pixel or more. "
            "Set --data.image_size, for example 224."
        )
    if not 0 < min_crop_scale <= 1:
        raise ConfigError(
            f"data.min_crop_scale: not a part of the picture's area; got {min_crop_scale}, "
            "expected more than 0 and at most 1. Set --data.min_crop_scale, for example 0.08."
        )
    assert 0 <= color_jitter <= 1
    assert 0 <= grayscale_probability <= 1
    samples = _Views(
        source,
        seed,
        epoch,
        image_size,
        min_crop_scale,
        color_jitter,
        grayscale_probability,
        max_pixels,
    )
    return load_batches(samples, positions, workers=workers)


def load_batches(batches: Dataset, positions: Sampler, *, workers: int) -> DataLoader:
    """Loads batches in order; `len` of the result is how many there are.

    Args:
        batches: Takes the positions of a batch, (B,), and returns it.
        positions: Of all batches.
        workers: Processes that load; 0: this one does.

    Raises: ConfigError: if the number of workers is negative.
    """
    if workers < 0:
        raise ConfigError(
            f"data.workers: not a number of processes; got {workers}, expected 0 or more. "
            "Set --data.workers 0 to load in the training process."
        )
    return DataLoader(
        batches,
        sampler=positions,
        batch_size=None,  # an item is a whole batch
        collate_fn=_unchanged,
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # else each epoch draws from torch's global one
    )


def micro_batches(
    num_samples: int,
    *,
    first_update: int,
    global_batch_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
) -> MicroBatches:
    """Where in the order of an epoch a rank reads, from a step to the epoch's end.

    Raises: ConfigError or DataError: as `sampler.check_batch_sizes`.
    """
    check_batch_sizes(
        num_samples,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        world_size=world_size,
    )
    num_updates = updates_per_epoch(num_samples, global_batch_size)
    assert 0 <= first_update <= num_updates
    assert 0 <= rank < world_size
    return MicroBatches(
        range(first_update, num_updates), global_batch_size, micro_batch_size, rank, world_size
    )


class MicroBatches(Sampler):
    """Positions of one micro batch after the other, (B,) each."""

    def __init__(
        self,
        updates: range,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.updates = updates
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size

    def __len__(self) -> int:
        share = self.global_batch_size // self.world_size
        return len(self.updates) * (share // self.micro_batch_size)

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        for update in self.updates:
            yield from rank_positions(
                update,
                global_batch_size=self.global_batch_size,
                micro_batch_size=self.micro_batch_size,
                rank=self.rank,
                world_size=self.world_size,
            )


def first_usable(
    make: Callable[[int], T],
    index: int,
    num_samples: int,
    *,
    seed: int,
    epoch: int,
    position: int,
    bad: list[str],
) -> tuple[T | None, int]:
    """What is made of a sample or, where that is bad, of a stand-in.

    A stand-in is drawn from the whole data set by a count of its own, so from (seed, epoch,
    position) again. When none of ten will do, there is nothing: a rank that stopped here would
    leave the others waiting, and the count of bad ones stops them all together.

    Args:
        make: Takes a sample's number; DataError if it cannot be used.
        index: The sample that the epoch's order has at this position.
        num_samples: Size of the data set.
        seed: The run's seed.
        epoch: Counted from 0.
        position: In the epoch's order.
        bad: Gets what is wrong with each sample that was tried in vain.

    Returns: what was made, or None; and the number of the sample that it was made of.
    """
    others: list[float] = []
    for number in range(MAX_TRIES):
        if number:
            others = others or list(uniforms(seed, epoch, [position], "replacement", MAX_TRIES)[0])
            index = int(others[number] * num_samples)
        try:
            return make(index), index
        except DataError as error:
            bad.append(str(error))
    return None, index


@dataclass(frozen=True)
class _Views(Dataset):
    """Positions to a `Batch`; runs in the workers."""

    source: ImageSource
    seed: int
    epoch: int
    image_size: int
    min_crop_scale: float
    color_jitter: float
    grayscale_probability: float
    max_pixels: int

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        indices = epoch_order(len(self.source), self.seed, self.epoch, positions)
        draws = self._draws(positions, "view", views.NUM_DRAWS)
        images, bad = [], []
        with suppress_stderr():
            for place, position in enumerate(positions.tolist()):
                image, indices[place] = first_usable(
                    lambda index, place=place, position=position: self._recolor(
                        self._view(index, draws[place]), position
                    ),
                    int(indices[place]),
                    len(self.source),
                    seed=self.seed,
                    epoch=self.epoch,
                    position=position,
                    bad=bad,
                )
                if image is None:
                    image = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
                images.append(image)
        return Batch(
            torch.stack(images),
            self.epoch,
            torch.from_numpy(positions),
            torch.from_numpy(indices),
            tuple(bad),
        )

    def _draws(self, positions: ArrayLike, stream: str, count: int) -> list[list[float]]:
        return uniforms(self.seed, self.epoch, positions, stream, count).tolist()

    def _view(self, index: int, draws: list[float]) -> torch.Tensor:
        encoded, where = self.source.read(index), self.source[index]
        size, image = size_before_decoding(encoded), None
        if size is None:
            image = decode(encoded, where, max_pixels=self.max_pixels)
            size = image.shape[-2:]
        box = views.crop_box(*size, draws, min_crop_scale=self.min_crop_scale)
        if image is None:
            bottom = box[0] + box[2]
            image = decode(encoded, where, max_pixels=self.max_pixels, num_rows=bottom)
        return views.box_view(image, box, draws, image_size=self.image_size)

    def _recolor(self, view: torch.Tensor, position: int) -> torch.Tensor:
        if self.color_jitter == 0 and self.grayscale_probability == 0:
            return view
        return color.jitter_color(
            view,
            self._draws([position], "color", color.NUM_DRAWS)[0],
            strength=self.color_jitter,
            grayscale_probability=self.grayscale_probability,
        )


def _unchanged(batch: Any) -> Any:
    return batch


def _mapped(move: Callable[[torch.Tensor], torch.Tensor], value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(move, part) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(move, part) for part in value)
    if isinstance(value, dict):
        return {key: _mapped(move, part) for key, part in value.items()}
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)

"""The micro batches of a rank, in order, from any update of an epoch to its end.

Workers get positions and do the rest: the order of the epoch, reading, decoding, the view. So
nothing that a worker knows beforehand can change a pixel, and only positions travel to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from fd_large.data.decode import decode
from fd_large.data.draws import uniforms
from fd_large.data.sampler import (
    check_batch_sizes,
    epoch_order,
    rank_positions,
    updates_per_epoch,
)
from fd_large.data.views import NUM_DRAWS, random_view
from fd_large.errors import ConfigError, DataError


class PictureSource(Protocol):
    """What a set of pictures has to offer; it must survive pickling."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str:
        """Says where picture `index` lies, for a message."""

    def read(self, index: int) -> bytes | bytearray:
        """Reads the bytes of picture `index`; DataError if that fails."""


@dataclass(frozen=True)
class Batch:
    """Views of some samples, and where in the run they belong.

    `images` is (B, 3, S, S) uint8; `positions` (B,) int64 are places in the epoch's order,
    `indices` (B,) int64 the samples there.
    """

    images: torch.Tensor
    epoch: int
    positions: torch.Tensor
    indices: torch.Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Copies the images without waiting for it.

        Positions and indices stay on the CPU: draws are made there, and reading them back from a
        device would stop the host.
        """
        return replace(self, images=self.images.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Moves the images to page-locked memory; the torch DataLoader calls this."""
        return replace(self, images=self.images.pin_memory())


class EpochLoader:
    """Iterates over the batches of a rank; `len` is how many of them there are."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        for result in self.loader:
            if isinstance(result, DataError):
                raise result
            yield result


def build_loader(
    source: PictureSource,
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
) -> EpochLoader:
    """The rest of an epoch for one rank: `micro batches an update` batches for each update.

    Args:
        source: The pictures.
        seed: The run's seed.
        epoch: Counted from 0.
        first_update: Of this epoch, counted from 0; where a resumed run goes on.
        global_batch_size: Images an update over all ranks.
        micro_batch_size: Images a batch.
        rank: Counted from 0.
        world_size: The number of ranks.
        image_size: Side of a view, in pixels.
        min_crop_scale: Smallest crop area, as a part of the picture's.
        workers: Processes that load; 0: this one does.

    Returns: an iterable of `Batch`; a picture that cannot be read or decoded raises DataError
        at its batch.
    Raises:
        ConfigError: if batch sizes do not divide or a number is out of range.
        DataError: if the global batch is larger than the data set.
    """
    check_batch_sizes(
        len(source),
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
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
    if workers < 0:
        raise ConfigError(
            f"data.workers: not a number of processes; got {workers}, expected 0 or more. "
            "Set --data.workers 0 to load in the training process."
        )
    num_updates = updates_per_epoch(len(source), global_batch_size)
    assert 0 <= first_update <= num_updates
    assert 0 <= rank < world_size
    positions = _MicroBatches(
        range(first_update, num_updates), global_batch_size, micro_batch_size, rank, world_size
    )
    return EpochLoader(
        DataLoader(
            _Views(source, seed, epoch, image_size, min_crop_scale),
            sampler=positions,
            batch_size=None,  # an item is a micro batch
            collate_fn=_unchanged,
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # else each epoch draws from torch's global one
        )
    )


class _MicroBatches(Sampler):
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


@dataclass(frozen=True)
class _Views(Dataset):
    """Positions to a `Batch`; runs in the workers."""

    source: PictureSource
    seed: int
    epoch: int
    image_size: int
    min_crop_scale: float

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch | DataError:
        indices = epoch_order(len(self.source), self.seed, self.epoch, positions)
        draws = uniforms(self.seed, self.epoch, positions, "view", NUM_DRAWS).tolist()
        try:
            images = torch.stack([
                self._view(index, row) for index, row in zip(indices.tolist(), draws, strict=True)
            ])  # fmt: skip
        except DataError as error:
            return error  # a worker's exception would come out as a traceback in its message
        return Batch(images, self.epoch, torch.from_numpy(positions), torch.from_numpy(indices))

    def _view(self, index: int, draws: list[float]) -> torch.Tensor:
        image = decode(self.source.read(index), self.source[index])
        return random_view(
            image, draws, image_size=self.image_size, min_crop_scale=self.min_crop_scale
        )


def _unchanged(batch: Batch | DataError) -> Batch | DataError:
    return batch

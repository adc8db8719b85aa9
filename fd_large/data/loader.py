"""The micro batches of a rank, in order, from any step of an epoch to its end.

Workers get positions and compute the order of the epoch, read, decode and make the view. So no
state of a worker can change a pixel, and only positions are sent to it.

A task provides a Dataset that turns the positions of a micro batch, (B,) int64, into a `Batch` by
`load_samples`. `build_loader` does the rest; `ViewBatches` is the Dataset of images without
labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from fd_large.data import views
from fd_large.data.image_sizes import ImageSizes
from fd_large.data.mixing import mixed_views, with_partners
from fd_large.data.parcel import parcel
from fd_large.data.random_numbers import uniforms
from fd_large.data.sampler import Blocks, MicroBatches, Portion, check_batch_sizes, samples_at
from fd_large.data.slow_images import at_image
from fd_large.data.source import ImageSource
from fd_large.data.suppress_stderr import suppress_stderr
from fd_large.data.worker import signals_blocked, start_worker
from fd_large.errors import DataError, FDError
from fd_large.ranks.processes import check_workers

# Number of images tried for one place in a batch; if all are bad, the dataset is bad.
MAX_TRIES = 10

T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """Views of some samples, with their place in the run.

    Attributes:
        images: (B, 3, S, S), usually uint8.
        epoch: Epoch, counted from 0.
        positions: (B,) int64, places in the epoch's order.
        indices: (B,) int64, the samples that were taken for them.
        bad: A message for each sample that was tried and cannot be used, its name first
            (`bad_images.py` counts them).
        targets: Further tensors of the task, in lists, tuples or dicts; or None.
    """

    images: torch.Tensor
    epoch: int
    positions: torch.Tensor
    indices: torch.Tensor
    bad: tuple[str, ...] = ()
    targets: Any = None

    def to(self, device: torch.device | str) -> Batch:
        """Copies images and targets without waiting for the copy.

        Positions and indices stay on the CPU: draws are made there, and reading them back from a
        device would stop the host.
        """
        return self._through(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Moves the tensors to page-locked memory; torch's DataLoader calls it."""
        return self._through(torch.Tensor.pin_memory)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields the tensors that `to` copies."""
        yield self.images
        yield from (leaf for leaf in tree_leaves(self.targets) if isinstance(leaf, torch.Tensor))

    def _through(self, move: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        targets = tree_map_only(torch.Tensor, move, self.targets)
        return replace(self, images=move(self.images), targets=targets)


def build_loader(
    batches: Dataset,
    num_samples: int,
    portion: Portion,
    *,
    global_batch_size: int,
    workers: int,
) -> DataLoader:
    """Returns the loader of the rest of an epoch for one rank.

    It has as many batches for each step as the rank has micro batches a step.

    Args:
        batches: Takes the positions of a micro batch, (B,), and returns a `Batch`; runs in the
            workers.
        num_samples: Size of the dataset.
        portion: The rank's micro batches, and the step to start from.
        global_batch_size: Images a step over all ranks.
        workers: Number of loading processes; 0 loads in this process.

    Raises:
        ConfigError: if batch sizes do not divide.
        DataError: if the global batch is larger than the dataset.
    """
    check_batch_sizes(
        num_samples,
        global_batch_size=global_batch_size,
        micro_batch_size=portion.micro_batch_size,
        world_size=portion.world_size,
    )
    positions = MicroBatches(num_samples, portion, global_batch_size)
    return load_batches(batches, positions, workers=workers)


def load_batches(batches: Dataset, places: Iterable[Any], *, workers: int) -> DataLoader:
    """Loads batches in order; `len` of the result is their number.

    Args:
        batches: Function from an item of `places` to a batch; runs in the workers.
        places: Items, one for each batch; has a length.
        workers: Number of loading processes; 0 loads in this process.

    Raises: ConfigError: if the machine cannot make use of as many processes.
    """
    check_workers(workers)
    return _Loader(
        _Carried(batches),
        sampler=places,
        batch_size=None,  # an item is a whole batch
        collate_fn=parcel,
        num_workers=workers,
        worker_init_fn=start_worker,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # Else each epoch would draw from torch's global one.
    )


@dataclass(frozen=True)
class _Carried(Dataset):
    """A dataset that returns an error in place of a batch, since torch would add a traceback."""

    batches: Dataset

    def __getitem__(self, place: Any) -> Any:
        try:
            return self.batches[place]
        except FDError as error:
            return error


class _Loader(DataLoader):
    """A loader that raises a loading process's error in place of its batch."""

    def __iter__(self) -> Any:
        # The loading processes start here, so their signals are blocked here.
        with signals_blocked():
            batches = super().__iter__()
        return _raising(batches)


def _raising(batches: Iterator[Any]) -> Iterator[Any]:
    for batch in batches:
        if isinstance(batch, FDError):
            raise batch
        yield batch


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """The result of loading one position.

    Attributes:
        value: Result for a sample, or None if no tried sample can be used.
        index: The sample of which the value was made, or the last sample that was tried.
        bad: A message for each tried sample that could not be used, its name first.
    """

    value: T | None
    index: int
    bad: tuple[str, ...]


def load_samples(
    make: Callable[[int, int], T],
    positions: NDArray[np.int64],
    indices: NDArray[np.int64],
    *,
    num_samples: int,
    seed: int,
    epoch: int,
    blocks: Blocks | None = None,
    name: Callable[[int], str] | None = None,
) -> list[Loaded[T]]:
    """Loads the sample at each position, or a replacement if it is bad.

    A replacement is drawn from the whole dataset, or from the window of its blocks, by (seed,
    epoch, position), so it is the same on any number of ranks and workers. If none of ten samples
    can be used, the value is None and no error is raised: a rank that stopped here would leave the
    others waiting, whereas the count of bad images stops all ranks together.

    Args:
        make: Takes a place in `positions` and a sample's number; DataError if it cannot be used.
        positions: (B,), places in the epoch's order.
        indices: (B,), the samples that the order has there.
        num_samples: Size of the dataset.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        blocks: Blocks of a source that is read in blocks, or None.
        name: Function from a sample to its place, for messages about slow reads.
    """
    loaded, worker = [], get_worker_info()
    slot = 0 if worker is None else worker.id + 1
    with suppress_stderr():
        for place, position in enumerate(positions.tolist()):
            index, value, bad = int(indices[place]), None, []
            for number in range(MAX_TRIES):
                if number:
                    draws = uniforms(seed, epoch, [position], "replacement", number + 1)
                    draw = float(draws[0, number])
                    index = (
                        int(draw * num_samples)
                        if blocks is None
                        else blocks.stand_in(seed, epoch, position, draw)
                    )
                try:
                    with at_image(slot, index, name):
                        value = make(place, index)
                    break
                except DataError as error:
                    bad.append(str(error))
            loaded.append(Loaded(value, index, tuple(bad)))
    return loaded


def load_at(
    make: Callable[[int, int], T],
    source: ImageSource,
    positions: NDArray[np.int64],
    *,
    seed: int,
    epoch: int,
) -> list[Loaded[T]]:
    """Loads the samples at some positions of the epoch's order.

    Args:
        make: Takes a place in `positions` and a sample's number; DataError if it cannot be used.
        source: The images.
        positions: (B,), places in the epoch's order.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
    """
    return load_samples(
        make,
        positions,
        samples_at(source, seed, epoch, positions),
        num_samples=len(source),
        seed=seed,
        epoch=epoch,
        blocks=getattr(source, "blocks", None),
        name=source.__getitem__,
    )


class Beside(Protocol):
    """Stored values of images' views, which go into a batch's targets."""

    def of(self, index: int, view: torch.Tensor) -> Any:
        """Returns the tensors, in tuples or dicts, of the view of image `index`.

        Raises: DataError: if nothing is stored for that image, which another image then replaces.
        """

    def blank(self) -> Any:
        """Returns tensors of the same shapes, for a place without a usable image."""


@dataclass(frozen=True)
class ViewBatches(Dataset):
    """Maps positions to a `Batch` of views, (B, 3, S, S) uint8; runs in the workers.

    Attributes:
        source: The images.
        settings: Settings of the views.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        fixed: Recurring views of each image; None: a new view at each position of an epoch.
        beside: Stored values of the views; None for batches without targets.
        mixed_among: Number of images a step over all ranks, if each is mixed with its neighbour
            (mixing.py); 0: images are not mixed.
        sizes: Size of the views for each step, replacing the settings'; None for a constant size.
    """

    source: ImageSource
    settings: views.ViewSettings
    seed: int
    epoch: int
    fixed: views.FixedViews | None = None
    beside: Beside | None = None
    mixed_among: int = 0
    sizes: ImageSizes | None = None

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        """Loads the views; a black view replaces an unusable sample."""
        if not self.mixed_among:
            return self._load(positions, len(positions))
        every, partners = with_partners(positions, self.mixed_among)
        batch = self._load(every, len(positions))
        images = mixed_views(
            batch.images,
            positions,
            partners,
            seed=self.seed,
            epoch=self.epoch,
            global_batch_size=self.mixed_among,
        )
        return replace(batch, images=images)

    def _load(self, positions: NDArray[np.int64], count: int) -> Batch:
        """Loads the views of all positions; other fields of the batch cover the first `count`."""
        draws_at, settings = self._draws(positions), self.settings
        if self.sizes is not None:
            side = self.sizes.at(self.epoch, int(positions[0]))
            settings = replace(settings, image_size=side)

        def make(place: int, index: int) -> tuple[torch.Tensor, Any]:
            view = views.jittered_view(self.source, index, draws_at(place, index), settings)
            return view, self.beside.of(index, view) if self.beside else None

        loaded = load_at(make, self.source, positions, seed=self.seed, epoch=self.epoch)
        black = torch.zeros(3, *[settings.image_size] * 2, dtype=torch.uint8)
        blank = black, self.beside.blank() if self.beside else None
        pairs = [blank if sample.value is None else sample.value for sample in loaded]
        return Batch(
            torch.stack([view for view, _ in pairs]),
            self.epoch,
            torch.from_numpy(positions[:count]),
            torch.tensor([sample.index for sample in loaded[:count]]),
            sum((sample.bad for sample in loaded[:count]), ()),
            default_collate([stored for _, stored in pairs[:count]]) if self.beside else None,
        )

    def _draws(self, positions: NDArray[np.int64]) -> Callable[[int, int], views.Draws]:
        """Returns a function that draws the view of a place in `positions` and its image."""
        fixed = self.fixed
        if fixed is not None:
            return lambda _place, index: fixed.draws(self.epoch, index)
        drawn = views.view_draws(self.seed, self.epoch, positions)
        return lambda place, _index: drawn[place]

"""Loads the micro-batches of a rank in order, from any step of an epoch to the epoch's end.

A worker (loading process) gets only the positions of a micro-batch in the epoch's order. The worker
computes which samples are at these positions, reads and decodes the samples, and makes the views.
So no state of a worker can change a pixel.

A task provides a Dataset that turns the positions of a micro-batch, (B,) int64, into a `Batch` by
`load_samples`, and `build_loader` makes the loader. `ViewBatches` is the Dataset of images without
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
    """A micro-batch of views, with the epoch and the positions of the samples.

    Attributes:
        images: (B, 3, S, S), usually uint8.
        epoch: Epoch, counted from 0.
        positions: (B,) int64, positions in the epoch's order.
        indices: (B,) int64, the index of the sample that was loaded for each position.
        bad: A message "NAME: REASON" for each sample that was tried and cannot be used, which
            `bad_images.py` counts.
        targets: Further tensors of the task, in lists, tuples or dicts; or None.
    """

    images: torch.Tensor
    epoch: int
    positions: torch.Tensor
    indices: torch.Tensor
    bad: tuple[str, ...] = ()
    targets: Any = None

    def to(self, device: torch.device | str) -> Batch:
        """Returns the batch with images and targets on `device`, without waiting for the copy.

        Positions and indices stay on the CPU, where random numbers are drawn from them, since
        reading them back from a device would stop the host.
        """
        return self._through(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Returns the batch with images and targets in page-locked memory, for the DataLoader."""
        return self._through(torch.Tensor.pin_memory)

    def tensors(self) -> Iterator[torch.Tensor]:
        """Yields `images` and the tensors in `targets`, which are the tensors that `to` copies."""
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
    """Returns the loader of a rank's micro-batches in the rest of an epoch.

    Args:
        batches: Dataset that takes the positions of a micro-batch, (B,), and returns a `Batch`;
            runs in the loading processes.
        num_samples: Number of samples of the whole dataset.
        portion: The rank, its micro-batch size, and the epoch and step to start from.
        global_batch_size: Number of images in a step over all ranks.
        workers: Number of loading processes; 0 loads in this process.

    Raises:
        ConfigError: if the batch sizes do not divide (`check_batch_sizes`), or the machine cannot
            make use of this number of loading processes.
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
    """Returns a loader that yields a batch for each item of `places`, in the order of the items.

    Args:
        batches: Dataset that takes an item of `places` and returns a batch; runs in the loading
            processes.
        places: An item for each batch; has a length, which is also the length of the loader.
        workers: Number of loading processes; 0 loads in this process.

    Raises: ConfigError: if the machine cannot make use of this number of loading processes.
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
    """Dataset with the items of `batches`, or an FDError in place of an item that cannot be made.

    The training process raises the error (`_Loader`). If a loading process raised it, torch would
    add the traceback of the loading process to the message.
    """

    batches: Dataset

    def __getitem__(self, place: Any) -> Any:
        try:
            return self.batches[place]
        except FDError as error:
            return error


class _Loader(DataLoader):
    """DataLoader that raises each error that `_Carried` has returned in place of a batch."""

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
    """The result of loading a sample for one position.

    Attributes:
        value: The loaded sample, or None if no tried sample can be used.
        index: Index of the sample that was loaded, or of the last sample that was tried.
        bad: A message "NAME: REASON" for each tried sample that could not be used.
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
    """Loads the sample at each position, or a replacement if this sample cannot be used.

    A replacement is drawn from the whole dataset, or, if samples are read in blocks, from the
    position's window of blocks. The replacement depends only on (seed, epoch, position), so that it
    is the same on any number of ranks and workers. If none of `MAX_TRIES` samples can be used, the
    result has the value None, and no error is raised. A rank that stopped here would leave the
    other ranks waiting, whereas the count of bad images stops all ranks together.

    Args:
        make: Function that takes an index into `positions` and the index of a sample, and returns
            the loaded sample; raises DataError if the sample cannot be used.
        positions: (B,), positions in the epoch's order.
        indices: (B,), the indices of the samples at these positions.
        num_samples: Number of samples of the whole dataset.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        blocks: Blocks of a source that is read in blocks, or None.
        name: Function that takes the index of a sample and returns its path or URL, for messages
            about slow reads.

    Returns: a result for each position.
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
    """Loads the samples of a source at some positions of the epoch's order.

    The arguments and results are those of `load_samples`.
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
    """Store of tensors for the views of images; the tensors become the targets of a batch."""

    def of(self, index: int, view: torch.Tensor) -> Any:
        """Returns the stored tensors, in tuples or dicts, for a view (3, S, S) uint8 of an image.

        Raises: DataError: if nothing is stored for the image; the loader then replaces the image.
        """

    def blank(self) -> Any:
        """Returns tensors of the shapes that `of` returns, for positions without a usable image."""


@dataclass(frozen=True)
class ViewBatches(Dataset):
    """Dataset that maps positions to a `Batch` of views, and runs in the loading processes.

    Attributes:
        source: The images.
        settings: Settings of the views.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        fixed: The recurring views of each image; None to draw a new view at each position of an
            epoch.
        beside: Store of tensors for the views; None for batches without targets.
        mixed_among: Number of images in a step over all ranks if each image is mixed with its
            neighbour (mixing.py); 0 if images are not mixed.
        sizes: Image sizes of which each step draws one, instead of the size in `settings`; None for
            a constant size.
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
        """Loads the views at some positions, (B,), of the epoch's order; images (B, 3, S, S) uint8.

        A position for which no sample can be used gets a black view.
        """
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
        """Loads the views at some positions as a batch.

        Args:
            positions: (B + R,), positions in the epoch's order. The last R positions are added
                partners of the others, with which these are mixed.
            count: B, the number of positions in the batch.

        Returns: a batch with B + R images, whose other fields have entries for the first B
            positions.
        """
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
        """Returns a function that gives the random numbers of a view.

        The function takes an index into `positions` and the index of an image. With `fixed` views,
        only the index of the image is used; otherwise only the position.
        """
        fixed = self.fixed
        if fixed is not None:
            return lambda _place, index: fixed.draws(self.epoch, index)
        drawn = views.view_draws(self.seed, self.epoch, positions)
        return lambda place, _index: drawn[place]

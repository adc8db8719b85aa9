"""The images of a diagnosis: spread over the dataset without repetition, decoded on demand."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large.data.centre_crops import central_view
from fd_large.data.decode import decode
from fd_large.data.labelled import evaluation_part, open_labelled
from fd_large.data.sampler import samples_at
from fd_large.data.source import ImageSource, open_images
from fd_large.errors import DataError

log = logging.getLogger(__name__)

_SEED = 0


class Views(NamedTuple):
    """A batch of images.

    Attributes:
        numbers: The number of each image in the dataset, (B,).
        of_size: {S: (B, 3, S, S) uint8}.
    """

    numbers: list[int]
    of_size: dict[int, Tensor]


class Sample:
    """A sample of a dataset's images, cropped as in tests.

    Args:
        root: The dataset as in `data.root`; its test part if it has parts.
        images: Largest number of images; the same images are chosen each time.

    Attributes:
        root: The dataset, or the part of it.

    Raises: DataError: if there are no images.
    """

    def __init__(self, root: str, images: int) -> None:
        self.root = evaluation_part(root)
        self._source = open_images(self.root)
        self._chosen = _choose(self._source, images)

    def __len__(self) -> int:
        return len(self._chosen)

    def labels(self, classes: Sequence[str]) -> NDArray[np.int64]:
        """Returns the class of each image of the dataset.

        Args:
            classes: Names of the classes in their order.

        Raises: DataError: if the images have no classes, or other classes.
        """
        return open_labelled(self.root, classes).labels

    def batches(self, num_batches: int, sizes: Sequence[int]) -> Iterator[Views]:
        """Yields batches of sizes as equal as possible.

        Images that cannot be used are left out with a warning.

        Args:
            num_batches: Number of batches.
            sizes: Sides of the square views that are cut from each image.

        Raises: DataError: if none of a batch can be used.
        """
        for part in range(num_batches):
            numbers: list[int] = []
            views: dict[int, list[Tensor]] = {size: [] for size in sizes}
            for index in self._chosen[part::num_batches]:
                try:
                    image = decode(self._source.read(index), self._source[index])
                except DataError as error:
                    log.warning("left out: %s", error)
                    continue
                numbers.append(index)
                for size in sizes:
                    views[size].append(central_view(image, size))
            if not numbers:
                raise DataError(
                    "data.root: no image of a batch can be used; got errors only, expected "
                    "images that can be decoded. See the warnings above."
                )
            yield Views(numbers, {size: torch.stack(cut) for size, cut in views.items()})


def _choose(source: ImageSource, images: int) -> list[int]:
    chosen: dict[str, int] = {}
    for start in range(0, len(source), 4096):
        places = np.arange(start, min(start + 4096, len(source)))
        for index in samples_at(source, _SEED, 0, places).tolist():
            # Built-in photographs are listed many times over.
            chosen.setdefault(source[index], index)
            if len(chosen) == images:
                return list(chosen.values())
    return list(chosen.values())

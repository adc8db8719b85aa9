"""Images of a diagnosis, which are spread over the dataset and decoded on demand."""

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
    """Batch of images, cropped to one or several sizes.

    Attributes:
        numbers: Index of each image in the dataset; B numbers.
        of_size: {side S in pixels: the images, (B, 3, S, S) uint8}.
    """

    numbers: list[int]
    of_size: dict[int, Tensor]


class Sample:
    """Sample of a dataset's images without repetition, each with the centre crop of a test.

    Args:
        root: The dataset, as `data.root`; if it has a test part, only that part is used.
        images: Largest number of images. The same images are chosen each time.

    Attributes:
        root: The dataset, or its test part.

    Raises: DataError: if there are no images.
    """

    def __init__(self, root: str, images: int) -> None:
        self.root = evaluation_part(root)
        self._source = open_images(self.root)
        self._chosen = _choose(self._source, images)

    def __len__(self) -> int:
        return len(self._chosen)

    def labels(self, classes: Sequence[str]) -> NDArray[np.int64]:
        """Returns the index of the class of each image of the dataset, not of the sample alone.

        Args:
            classes: Names of the classes in their order.

        Raises: DataError: if the images have no classes, or different ones.
        """
        return open_labelled(self.root, classes).labels

    def batches(self, num_batches: int, sizes: Sequence[int]) -> Iterator[Views]:
        """Yields the sample in batches whose numbers of images differ by at most one.

        Images that cannot be decoded are left out with a warning.

        Args:
            num_batches: Number of batches.
            sizes: Sides in pixels of the square views that are cut from each image.

        Raises: DataError: if no image of a batch can be decoded.
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
                    "data.root: no image of a batch can be used; got no readable image, expected "
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

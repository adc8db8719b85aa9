"""The images of a diagnosis: spread over the dataset, none twice, decoded as they are needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.data.decode import decode
from fd_large.data.sampler import samples_at
from fd_large.data.source import ImageSource, open_images
from fd_large.errors import DataError

log = logging.getLogger(__name__)

_SEED = 0


class Sample:
    """Some images of a dataset.

    Args:
        root: The dataset as in `data.root`: a folder, tar shards or a built-in one.
        images: Number of images at most; the same ones every time.

    Raises: DataError: if there are none.
    """

    def __init__(self, root: str, images: int) -> None:
        self._source = open_images(root)
        self._chosen = _choose(self._source, images)

    def __len__(self) -> int:
        return len(self._chosen)

    def batches(self, num_batches: int, sizes: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Yields batches as {side: (n, 3, side, side) uint8}, of sizes as equal as possible.

        Images that cannot be used are left out with a warning.

        Args:
            num_batches: Number of batches.
            sizes: Sides of the square views that are cut from each image.

        Raises: DataError: if none of a batch can be used.
        """
        for part in range(num_batches):
            views: dict[int, list[Tensor]] = {size: [] for size in sizes}
            for index in self._chosen[part::num_batches]:
                try:
                    image = decode(self._source.read(index), self._source[index])
                except DataError as error:
                    log.warning("left out: %s", error)
                    continue
                for size in sizes:
                    views[size].append(centre_view(image, size))
            if not views[sizes[0]]:
                raise DataError(
                    "data.root: no image of a batch can be used; got errors only, expected "
                    "images that can be decoded. See the warnings above."
                )
            yield {size: torch.stack(cut) for size, cut in views.items()}


def centre_view(image: Tensor, size: int) -> Tensor:
    """Cuts out the largest square in the middle and resizes it (bilinear, antialiased).

    Args:
        image: (3, H, W) uint8.
        size: Side of the view, in pixels.

    Returns: (3, size, size) uint8.
    """
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[None, :, top : top + side, left : left + side]
    return F.interpolate(square, (size, size), mode="bilinear", antialias=True)[0]


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

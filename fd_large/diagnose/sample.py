"""The images that are looked at: spread over the set, none twice, decoded as they are needed."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.data.decode import decode
from fd_large.data.sampler import epoch_order
from fd_large.data.source import ImageSource, open_images
from fd_large.errors import DataError

log = logging.getLogger(__name__)

_SEED = 0


class Sample:
    """Some images of a set.

    Args:
        root: As `data.root`: a folder, tar shards or a built-in set.
        images: How many at most; the same ones every time.

    Raises: DataError: if there are none.
    """

    def __init__(self, root: str, images: int) -> None:
        self._source = open_images(root)
        self._chosen = _choose(self._source, images)

    def __len__(self) -> int:
        return len(self._chosen)

    def batches(self, num_batches: int, sizes: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Yields so many batches, as even as can be: side to (n, 3, side, side) uint8.

        Images that cannot be used are left out with a warning.

        Raises: DataError: if none of a batch can be used.
        """
        for part in range(num_batches):
            views: dict[int, list[Tensor]] = {size: [] for size in sizes}
            for index in self._chosen[part::num_batches]:
                try:
                    picture = decode(self._source.read(index), self._source[index])
                except DataError as error:
                    log.warning("left out: %s", error)
                    continue
                for size in sizes:
                    views[size].append(centre_view(picture, size))
            if not views[sizes[0]]:
                raise DataError(
                    "data.root: no image of a batch can be used; got errors only, expected "
                    "images that can be decoded. See the warnings above."
                )
            yield {size: torch.stack(cut) for size, cut in views.items()}


def centre_view(picture: Tensor, size: int) -> Tensor:
    """The largest square in the middle, resized (bilinear, antialiased).

    Args:
        image: (3, H, W) uint8.
        size: Side of the view.

    Returns: (3, size, size) uint8.
    """
    height, width = picture.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = picture[None, :, top : top + side, left : left + side]
    return F.interpolate(square, (size, size), mode="bilinear", antialias=True)[0]


def _choose(source: ImageSource, images: int) -> list[int]:
    chosen: dict[str, int] = {}
    for start in range(0, len(source), 4096):
        places = range(start, min(start + 4096, len(source)))
        for index in epoch_order(len(source), _SEED, 0, list(places)).tolist():
            # Built-in photographs are listed many times over.
            chosen.setdefault(source[index], index)
            if len(chosen) == images:
                return list(chosen.values())
    return list(chosen.values())

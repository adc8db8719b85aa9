"""Centre crops of labelled images, from which features and accuracies are computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from fd_large.data.decode import decode
from fd_large.data.labelled import LabelledImages
from fd_large.data.loader import load_batches
from fd_large.data.suppress_stderr import suppress_stderr
from fd_large.errors import DataError

# As is usual for ImageNet, where the short side is resized to 256 for a crop of 224.
RESIZE_RATIO = 256 / 224

# Label of an image that cannot be used.
NO_LABEL = -1


def central_view(image: Tensor, image_size: int) -> Tensor:
    """Resizes an image (bicubic, antialiased), and returns the square crop at its centre.

    The short side of the resized image is 256/224 times `image_size`, the side of the crop in
    pixels.

    Args:
        image: (3, H, W) uint8.

    Returns: (3, image_size, image_size) uint8, contiguous.
    """
    height, width = image.shape[-2:]
    short = int(RESIZE_RATIO * image_size)
    # As torchvision's Resize and CenterCrop round.
    if height <= width:
        size = (short, int(short * width / height))
    else:
        size = (int(short * height / width), short)
    resized = F.interpolate(image[None], size, mode="bicubic", antialias=True)[0]
    top, left = (round((side - image_size) / 2) for side in size)
    return resized[:, top : top + image_size, left : left + image_size].contiguous()


class CentralBatch(NamedTuple):
    """A batch of centre crops of consecutive images.

    Attributes:
        start: Index in the dataset of the first image of the batch.
        images: (B, 3, S, S) uint8; an image that cannot be used is black.
        labels: (B,) int64; an image that cannot be used has `NO_LABEL`.
        bad: A message for each image that cannot be used.
    """

    start: int
    images: Tensor
    labels: Tensor
    bad: tuple[str, ...]


@dataclass(frozen=True)
class _CentralBatches(Dataset):
    source: LabelledImages
    image_size: int
    max_pixels: int

    def __getitem__(self, where: tuple[int, int]) -> CentralBatch:
        start, stop = where
        images, labels, bad = [], [], []
        if self.source.blocks is not None:
            first = self.source.blocks.block(start)[0]
            self.source.expect(range(first, min(first + 3, len(self.source.blocks.ends))))
        with suppress_stderr():
            for index in range(start, stop):
                label = self.source.label(index)
                try:
                    image = decode(
                        self.source.read(index), self.source[index], max_pixels=self.max_pixels
                    )
                    images.append(central_view(image, self.image_size))
                except DataError as error:
                    images.append(torch.zeros(3, self.image_size, self.image_size).byte())
                    bad.append(str(error))
                    label = NO_LABEL
                labels.append(label)
        return CentralBatch(start, torch.stack(images), torch.tensor(labels), tuple(bad))


def central_batches(
    source: LabelledImages,
    *,
    image_size: int,
    batch_size: int,
    rank: int,
    world_size: int,
    workers: int,
    max_pixels: int,
) -> Iterator[CentralBatch]:
    """Yields the centre crops of a rank's images.

    Batch b has the images b*B to (b+1)*B - 1, and belongs to rank b modulo `world_size`. So a batch
    has the same images on any number of ranks, and results computed from it are the same to the
    bit.

    Args:
        source: The images.
        image_size: Side of a crop, in pixels.
        batch_size: B; the last batch may be smaller.
        rank: This rank, counted from 0.
        world_size: Number of ranks.
        workers: Number of loading processes; 0 loads in this process.
        max_pixels: Largest number of pixels of an image. Larger images are not decoded, and count
            as images that cannot be used.
    """
    starts = range(rank * batch_size, len(source), world_size * batch_size)
    ends = [(start, min(start + batch_size, len(source))) for start in starts]
    batches = _CentralBatches(source, image_size, max_pixels)
    return iter(load_batches(batches, ends, workers=workers))

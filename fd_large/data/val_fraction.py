"""Divides a folder without parts into training images and test images, by the images' names alone.

An image is held out for tests if a hash of its path relative to the folder, scaled to [0, 1), is
below the fraction. So the parts are the same on every machine and in every command, and an image
added later moves no other image to another part.
"""

from __future__ import annotations

import hashlib
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable
from copy import copy
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fd_large.data.folder import ImageFolder
from fd_large.data.source import ImageSource
from fd_large.errors import DataError

log = logging.getLogger(__name__)

FIELD = "data.val_fraction"


class Part:
    """`ImageSource` of a part of another source's images, in the same order.

    Args:
        images: The other source, which has all images.
        places: (len,) int64, the indices of the part's images in `images`, rising.

    Attributes:
        images: The source with all images.
        fingerprint: A hash of the fingerprint of `images` and of the indices.
    """

    def __init__(self, images: ImageSource, places: NDArray[np.int64]) -> None:
        self.images, self._places = images, places
        digest = hashlib.sha256(images.fingerprint.encode())
        digest.update(places.tobytes())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> str:
        return self.images[self.place(index)]

    def read(self, index: int) -> bytes | bytearray:
        """Returns the bytes of image `index`; raises DataError if the image cannot be read."""
        return self.images.read(self.place(index))

    def place(self, index: int) -> int:
        """Returns the index of the part's image `index` in the source with all images.

        Raises: IndexError: if the part has no such image.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return int(self._places[index])


class DivisibleImages(ABC):
    """Base class of a dataset whose images can be divided into training images and test images.

    The images in use are all images of the dataset, or those of one part. `len(dataset)` is the
    number of images in use, and `dataset[i]` is the path of the i-th image in use.

    Attributes:
        folder: The folder of the images.
        places: (N, ...), a row for each image in use, with what the subclass needs to find the
            image and the other parts of its sample.
        fingerprint: A hash of the images.
    """

    folder: str
    places: NDArray[np.int64]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.places)

    @abstractmethod
    def __getitem__(self, index: int) -> str:
        """Returns the path of image `index` of the images in use, counted from 0."""

    def part(self, part: str, fraction: float) -> Self:
        """Returns the dataset of the training images ("train") or of the test images ("val").

        The fraction is that of the images that are held out for tests. If it is 0, the dataset
        itself is returned.

        Raises: DataError: if one of the two parts would be empty.
        """
        if not fraction:
            return self
        names = (os.path.relpath(path, self.folder) for path in self)
        numbers, chosen = divided(names, part, fraction, root=self.folder), copy(self)
        chosen.places = self.places[numbers]
        digest = hashlib.sha256(self.fingerprint.encode() + numbers.tobytes())
        chosen.fingerprint = digest.hexdigest()
        return chosen


def is_held_out(name: str, fraction: float) -> bool:
    """Whether an image belongs to the test images.

    The name is the image's path relative to the folder, with "/" between the parts, and the
    fraction is that of the images that are held out for tests.
    """
    digest = hashlib.blake2b(os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def places_of(images: ImageSource, part: str, fraction: float, *, where: str) -> NDArray[np.int64]:
    """Returns the indices of a folder's training images or test images, in rising order.

    Args:
        images: The images of the folder.
        part: "train" or "val".
        fraction: Fraction of the images that are held out for tests, in (0, 1).
        where: Name of the configuration field that holds the folder, for messages.

    Raises: DataError: if `images` is not an `ImageFolder`, or one of the two parts would be empty.
    """
    if not isinstance(images, ImageFolder):
        raise DataError(
            f"{FIELD}: only a folder of images can be divided by file names; got "
            f"{type(images).__name__} for {where}, expected a folder. Leave out --{FIELD}, and "
            "use separate train/ and val/ parts."
        )
    names = (images.name(index) for index in range(len(images)))
    return divided(names, part, fraction, root=images.root)


def divided(names: Iterable[str], part: str, fraction: float, *, root: str) -> NDArray[np.int64]:
    """Divides images by their names into parts as `places_of`, and returns the indices of a part.

    Args:
        names: Paths of all images relative to their folder, with "/" between the parts.
        root: The folder, for messages.

    Raises: DataError: if one of the two parts would be empty.
    """
    held_out = np.fromiter((is_held_out(name, fraction) for name in names), bool)
    count = int(held_out.sum())
    if not 0 < count < len(held_out):
        raise DataError(
            f"{FIELD}: a part without an image; got {count} of the {len(held_out)} images of "
            f"{root!r} held out by {fraction}, expected at least one in each part. Change "
            f"--{FIELD}, or add images."
        )
    if part == "train":
        log.info(
            "%s: %d of %d images of %s are the test images here, by a hash of their names, and "
            "the other images are the training images. A model that was trained on %s before has "
            "seen these test images, unless it held out the same part",
            FIELD,
            count,
            len(held_out),
            root,
            root,
        )
    return np.flatnonzero(held_out if part == "val" else ~held_out)

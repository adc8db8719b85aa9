"""Datasets in which each image has a truth file with a class or a depth for each pixel."""

from __future__ import annotations

import hashlib
import io
import os
from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fd_large.data.decode import decode
from fd_large.data.folder import ImageFolder, read_image
from fd_large.data.image_header import MAX_PIXELS
from fd_large.data.val_fraction import DivisibleImages
from fd_large.errors import DataError
from fd_large.files import kind_of

FILES_CHECKED = 8
"""Largest number of truth files that are read before a run starts."""


class Layout(NamedTuple):
    """Where a dataset has the images and the truth files of a split.

    An image and its truth file have the same subfolder and the same stem, except for the endings.

    Attributes:
        images: Folder of the images below the dataset's folder; {split} stands for the split.
        truths: Folder of the truth files; {split} stands for the split.
        train: The dataset's name of the split "train".
        val: The dataset's name of the split "val".
        image_tail: Ending of an image's stem that the stem of its truth file lacks.
        truth_tail: Ending of a truth file's stem that the stem of its image lacks.
    """

    images: str
    truths: str
    train: str = "train"
    val: str = "val"
    image_tail: str = ""
    truth_tail: str = ""

    def folders(self, root: str, split: str) -> tuple[str, str]:
        """Returns the folder of a split's images and the folder of its truth files.

        Args:
            root: The dataset's folder.
            split: "train" or "val".
        """
        name = {"train": self.train, "val": self.val}.get(split, split)
        images, truths = (part.format(split=name) for part in (self.images, self.truths))
        return os.path.join(root, images), os.path.join(root, truths)


class Pairs(NamedTuple):
    """Paths of images and their truth files.

    Attributes:
        images: Paths of the images.
        truths: Paths of the truth files.
        places: (N, 2), for each image that is used, its index in `images` and the index of its
            truth file in `truths`.
        fingerprint: A hash of the files' names.
        folder: The folder of the images.
    """

    images: Sequence[str]
    truths: Sequence[str]
    places: NDArray[np.int64]
    fingerprint: str
    folder: str


class PairedImages(DivisibleImages):
    """Base class of a split's images with their truth files; item i is the path of image i.

    Args:
        pairs: The images and their truth files.
        max_pixels: Largest number of pixels of an image. Reading a larger image by `sample` raises
            DataError.

    Attributes:
        fingerprint: A hash of the files' names.
    """

    def __init__(self, pairs: Pairs, *, max_pixels: int) -> None:
        self._pairs, self.max_pixels = pairs, max_pixels
        self.folder, self.places, self.fingerprint = pairs.folder, pairs.places, pairs.fingerprint

    def __getitem__(self, index: int) -> str:
        return self._pairs.images[int(self.places[index, 0])]

    def read(self, index: int) -> bytearray:
        """Returns the encoded bytes of the file of image `index`.

        Raises: DataError: if the file cannot be read.
        """
        return read_image(self[index])

    def truth_file(self, index: int) -> str:
        """Returns the path of the truth file of image `index`."""
        return self._pairs.truths[int(self.places[index, 1])]

    @abstractmethod
    def truth(self, index: int) -> NDArray[Any]:
        """Reads the truth file of image `index`: the class or depth of each pixel, (H, W).

        Raises: DataError: if the file cannot be used.
        """

    def sample(self, index: int) -> tuple[Tensor, NDArray[Any]]:
        """Reads image `index`, (3, H, W) uint8, and the class or depth of each pixel, (H, W).

        Raises: DataError: if a file cannot be read, or if image and truth differ in size.
        """
        image = decode(self.read(index), self[index], max_pixels=self.max_pixels)
        truth = self.truth(index)
        if image.shape[-2:] != truth.shape:
            raise DataError(
                f"{self.truth_file(index)}: its size differs from its image's; got "
                f"{truth.shape[1]} x {truth.shape[0]} pixels, expected {image.shape[-1]} x "
                f"{image.shape[-2]}. Make the file again."
            )
        return image, truth

    def some_truths(self) -> list[NDArray[Any]]:
        """Returns the class or depth of each pixel, (H, W) each, in some of the truth files.

        Up to `FILES_CHECKED` files, spread evenly over the dataset, are read.

        Raises: DataError: if a file cannot be used.
        """
        some = np.linspace(0, len(self) - 1, min(FILES_CHECKED, len(self))).round()
        return [self.truth(int(index)) for index in some]


def read_numbers(
    path: str,
    modes: Collection[str],
    expected: str,
    *,
    max_pixels: int = MAX_PIXELS,
) -> NDArray[np.int32]:
    """Reads an image file that stores a number for each pixel, (H, W).

    Args:
        path: The file.
        modes: The accepted modes of Pillow.
        expected: What kind of file is expected, for messages.
        max_pixels: Largest number of pixels of the file.

    Raises:
        DataError: if the file cannot be read, has a mode that is not in `modes`, or has more pixels
            than `max_pixels`.
    """
    encoded = read_image(path)
    try:
        with Image.open(io.BytesIO(encoded)) as file:
            if file.width * file.height > max_pixels:
                raise DataError(
                    f"{path}: too large; got {file.width} x {file.height} pixels, expected at most "
                    f"{max_pixels:,}. Set --data.max_pixels."
                )
            if file.mode not in modes:
                raise DataError(
                    f"{path}: invalid file; got an image of mode {file.mode}, expected {expected}. "
                    "Convert the file, or name another folder."
                )
            return np.array(file).astype(np.int32)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: cannot be decoded; got {error}, expected {expected}. Fetch the file again."
        ) from error


def pairs_in_folders(
    layouts: Sequence[Layout], root: str, split: str, *, kind: str, where: str, otherwise: str = ""
) -> Pairs:
    """Finds the images of a split, and the truth file of each image.

    Args:
        layouts: Possible layouts, of which the first that exists is used. If images and truth files
            are in the same folder, the truth files are the PNGs.
        root: Folder of the dataset.
        split: "train" or "val".
        kind: Plural noun for the truth, such as "labels", for messages.
        where: The recipe's field that names the folder, for messages.
        otherwise: Words on other ways to name a dataset, for messages.

    Raises: DataError: if there is no such split, or if an image has no truth file.
    """
    layout = _layout_of(layouts, root, split, kind, where, otherwise)
    image_root, truth_root = layout.folders(root, split)
    of_images, of_truths = (ImageFolder(folder, where=where) for folder in (image_root, truth_root))
    images: Sequence[str] = of_images
    truths: Sequence[str] = of_truths
    if image_root == truth_root:
        images = [path for path in of_images if not path.lower().endswith(".png")]
        truths = [path for path in of_images if path.lower().endswith(".png")]
    numbers = {}
    for number, path in enumerate(truths):
        stem = _stem(path, truth_root)
        if stem.endswith(layout.truth_tail):
            numbers[stem.removesuffix(layout.truth_tail)] = number
    stems = [_stem(path, image_root).removesuffix(layout.image_tail) for path in images]
    if not stems:
        raise DataError(
            f"{where}: no images beside {kind}; got PNGs alone in {image_root}, expected JPEGs, "
            f"each with a PNG of the same stem that holds its {kind}. Set --{where} to another "
            "folder."
        )
    missing = [stem for stem in stems if stem not in numbers]
    if missing:
        raise DataError(
            f"{where}: images without {kind} in {truth_root}; got {len(missing)} of {len(stems)} "
            f"({missing[0]}), expected a file {missing[0]}{layout.truth_tail}.png. Unpack the "
            f"{kind} there, or remove these images."
        )
    both = of_images.fingerprint + of_truths.fingerprint
    return Pairs(
        images,
        truths,
        np.array([(place, numbers[stem]) for place, stem in enumerate(stems)]),
        hashlib.sha256(both.encode()).hexdigest(),
        image_root,
    )


def _layout_of(
    layouts: Sequence[Layout], root: str, split: str, kind: str, where: str, otherwise: str
) -> Layout:
    """Returns the first layout whose folders exist. The arguments are those of `pairs_in_folders`.

    Raises: DataError: if the folders of no layout exist.
    """
    for layout in layouts:
        if all(kind_of(folder) == "folder" for folder in layout.folders(root, split)):
            return layout
    pairs = (
        dict.fromkeys(os.path.relpath(folder, root) for folder in layout.folders(root, split))
        for layout in layouts
    )
    tried = ", ".join(" with ".join(folders) for folders in pairs)
    raise DataError(
        f"{where}: no images with {kind} of the split {split!r}; got {root!r}, expected a folder "
        f"with one of these: {tried}{otherwise}. Set --{where} to the folder that holds both."
    )


def _stem(path: str, root: str) -> str:
    """Returns `path` relative to the folder `root`, without the extension."""
    return os.path.splitext(os.path.relpath(path, root))[0]

"""The user's own source of images: `data.root module:PATH/TO/FILE.py:NAME`.

NAME is a class, or a function that returns an object with the images. `len(images)` is the number
of images, and `images[i]` is an array (H, W, 3) or (H, W) of uint8, or the bytes of an image file.
NAME is called without arguments, or, for the parts of a labelled dataset, with "train" or "val".
The object may also have

    labels() -> (classes of the images as whole numbers, (len,); names of the classes or None)
    name(i) -> str, the name of an image in messages
    fingerprint: str, which changes when the images change

A source runs in the loading processes, and must return the same image for an index in each process.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fd_large import doors
from fd_large.errors import DataError
from fd_large.files import kind_of

# Images whose content makes the fingerprint of a source that states none.
_SAMPLED = 16
# Images of which one has to be readable when a source is opened.
_TRIED = 10


def open_custom(root: str, *, where: str, part: str = "") -> CustomImages | None:
    """Opens the user's own source, or returns None if `root` names no such source (`is_custom`).

    Args:
        root: Value of the configuration field, such as "module:PATH/TO/FILE.py:NAME". (doors.py
            describes all forms of a name for the user's own code.)
        where: Name of the configuration field, for messages.
        part: "train" or "val" for a part of a labelled dataset; "" for all images.

    Raises:
        ConfigError: if the source cannot be imported.
        DataError: if the object is not a source of images, has no image, or none of ten images can
            be read.
    """
    return _opened(root, where, part) if is_custom(root) else None


@lru_cache(maxsize=8)
def _opened(root: str, where: str, part: str) -> CustomImages:
    # Opened once, since a job asks for its images repeatedly, and a source may hold them in memory.
    return CustomImages(root, where=where, part=part)


def is_custom(root: str) -> bool:
    """Whether `root` names a source in the user's own code or in an installed package.

    Such a root starts with "module:", or is a name that an installed package gives to a source. A
    name is taken for a file or folder if there is one of this name.
    """
    if doors.is_own(root):
        return True
    is_word = root.replace("-", "_").isidentifier()
    return is_word and not kind_of(Path(root)) and root in doors.installed("sources")


class CustomImages:
    """`ImageSource` of the images of a user's source.

    Images that the source returns as arrays are passed on as PPM files, which decode to the same
    pixels.

    Attributes:
        fingerprint: The fingerprint of the user's source; if the source has none, a hash of the
            number of images and of a few images' bytes.
        labels: Method that checks and returns the class of each image, and the names of the classes
            or None; absent if the source has no labels.
    """

    fingerprint: str

    def __init__(self, root: str, *, where: str, part: str = "") -> None:
        make = doors.load(root, kind="sources", where=where)
        arguments = (part,) if part else ()
        try:
            self._images = make(*arguments)
            count = len(self._images)
            self._name = getattr(self._images, "name", str)
        except Exception as error:  # The user's code may raise anything.
            called = f"{root.rpartition(':')[2]}({', '.join(map(repr, arguments))})"
            raise DataError(
                f"{where}: not a source of images; got {doors.cause(error)}, expected an object "
                f"with a length and images by index from {called}. docs/extending.md has an "
                "example."
            ) from error
        self._count, self._root = count, root
        self._named = root, where, part
        self._code = doors.hashes(root)
        if not count:
            raise DataError(
                f"{where}: no image in the source; got {root} of length 0, expected at least one. "
                "Name another source."
            )
        self._try()
        self.fingerprint = getattr(self._images, "fingerprint", None) or self._hash()
        if hasattr(self._images, "labels"):
            self.labels = self._labels

    def __reduce__(self) -> Any:
        # A loading process that was not forked opens the source again.
        return _reopened, (*self._named, self._code)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._count:
            raise IndexError(f"image {index} of {self._count}")
        return f"{self._root}: image {self._name(index)}"

    def read(self, index: int) -> bytes:
        """Returns the bytes of image `index`.

        Raises: DataError: if the source raises an error, or returns something else than an image.
        """
        try:
            image = self._images[index]
        except Exception as error:  # The user's code may raise anything.
            raise DataError(
                f"{self[index]}: cannot be read; got {doors.cause(error)}, expected an image. "
                "Correct the source or its data."
            ) from error
        if isinstance(image, (bytes, bytearray)):
            return image
        pixels = np.asarray(image)
        if pixels.ndim == 2:
            pixels = np.repeat(pixels[:, :, None], 3, axis=2)
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
            raise DataError(
                f"{self[index]}: not an image; got {pixels.dtype} {pixels.shape}, expected uint8 "
                "(height, width, 3) or (height, width), or the bytes of an image file. Correct "
                "the source."
            )
        height, width, _ = pixels.shape
        return f"P6 {width} {height} 255\n".encode() + pixels.tobytes()

    def _try(self) -> None:
        """Raises DataError if none of `_TRIED` images, spread over the source, can be read."""
        problems = []
        for place in self._spread(_TRIED):
            try:
                self.read(place)
                return
            except DataError as error:  # A bad image is skipped in training too.
                problems.append(error)
        raise problems[0]

    def _spread(self, count: int) -> list[int]:
        """Returns the indices of at most `count` images, spread evenly over the whole source."""
        places: list[int] = np.unique(np.linspace(0, self._count - 1, count).astype(int)).tolist()
        return places

    def _hash(self) -> str:
        digest = hashlib.sha256(str(self._count).encode())
        for place in self._spread(_SAMPLED):
            with suppress(DataError):  # A bad image is skipped in training too.
                digest.update(self.read(place))
        return digest.hexdigest()[:16]

    def _labels(self) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
        try:
            values, names = self._images.labels()
            labels = np.asarray(values)
        except Exception as error:  # The user's code may raise anything.
            raise DataError(
                f"{self._root}: labels() returns no usable labels; got {doors.cause(error)}, "
                "expected a whole number for each image, and names or None. Correct the source."
            ) from error
        if labels.shape != (self._count,) or labels.dtype.kind not in "iu" or labels.min() < 0:
            raise DataError(
                f"{self._root}: invalid labels; got {labels.dtype} {labels.shape}, expected a "
                f"whole number from 0 up for each of the {self._count} images. Correct the source."
            )
        if names is not None and len(names) <= labels.max():
            raise DataError(
                f"{self._root}: a label without a class name; got label {labels.max()}, expected "
                f"less than {len(names)}, the number of names. Correct the source."
            )
        return labels.astype(np.int64), None if names is None else tuple(map(str, names))


def _reopened(root: str, where: str, part: str, code: dict[str, str]) -> CustomImages:
    doors.allow_unchanged(code)  # The file must be as it was when the source was first opened.
    return _opened(root, where, part)

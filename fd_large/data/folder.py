"""A folder of pictures, sub folders included, in an order that every machine agrees on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fd_large.errors import DataError

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm",
)  # fmt: skip


class ImageFolder:
    """The pictures below a folder: `len(folder)`, `folder[i]` (the path), `folder.read(i)`.

    Class sub folders and a flat folder both do; labels are not looked at. The order is that of
    the UTF-8 bytes of the paths relative to the root, parts joined by "/", which depends neither
    on the file system nor on the locale. Links to folders are followed; names that start with a
    dot are left out.

    The names are one block of bytes and an array of ends rather than a list of strings: a worker
    shares them (fork) or gets them in one copy (spawn), and no reference count ever touches them.
    """

    def __init__(self, root: str | Path) -> None:
        """Lists the folder.

        Args:
            root: The folder.

        Raises: DataError: if it is missing or holds no picture.
        """
        self.root = os.fspath(root)
        if not self.root or not os.path.isdir(self.root):
            raise DataError(
                f"data.root: no such folder; got {self.root!r}, expected a folder of pictures. "
                "Set --data.root FOLDER."
            )
        names = sorted(os.fsencode(name) for name in _pictures_below(self.root))
        if not names:
            raise DataError(
                f"data.root: no picture in the folder or below it; got {self.root!r}, expected "
                f"files ending in {' '.join(EXTENSIONS)}. Set --data.root to a folder with such "
                "files."
            )
        self._names = b"".join(names)
        self._ends = np.cumsum([len(name) for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        start = self._ends[index - 1] if index else 0
        return os.path.join(self.root, os.fsdecode(self._names[start : self._ends[index]]))

    def read(self, index: int) -> bytearray:
        """The bytes of picture `index`.

        Raises: DataError: if the file cannot be read.
        """
        path = self[index]
        try:
            with open(path, "rb") as file:
                return bytearray(file.read())
        except OSError as error:
            raise DataError(
                f"{path}: cannot be read; got {error.strerror or error}, expected a picture. "
                "Restore the file or remove it from the folder."
            ) from error


def _pictures_below(root: str) -> Iterator[str]:
    """Yields the relative paths, "/" between the parts, in no order.

    Raises: DataError: if a folder cannot be listed (an epoch over a part would go unnoticed).
    """
    pending: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while pending:
        folder, above = pending.pop()
        path = os.path.join(root, folder)
        try:
            status = os.stat(path)
            identity = (status.st_dev, status.st_ino)
            if identity in above:  # a link to a folder that holds it would go round for ever
                continue
            with os.scandir(path) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        pending.append((f"{folder}{entry.name}/", above | {identity}))
                    elif entry.name.lower().endswith(EXTENSIONS):
                        yield folder + entry.name
        except OSError as error:
            raise DataError(
                f"data.root: a folder cannot be listed; got {error.strerror or error} for "
                f"{path!r}, expected a readable folder. Mend its permissions or remove it."
            ) from error

"""Source of the images in a folder and its subfolders, in the same order on every machine."""

from __future__ import annotations

import logging
import os
import stat
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fd_large.data.listing import Add, filled, listed, settled
from fd_large.data.roots import local_kind
from fd_large.errors import DataError

log = logging.getLogger(__name__)

EXTENSIONS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm",
)  # fmt: skip
# Far above the size of any image within the limit of pixels, so larger files are not read.
MAX_FILE_BYTES = 1 << 29
_LONGEST_NAME = 4096  # No file system takes a longer path.


class ImageFolder:
    """`ImageSource` of the images below a folder; `folder[i]` is the path of image i.

    Images are sorted by the UTF-8 bytes of their paths relative to the root, with "/" between the
    parts, so that the order depends neither on the file system nor on the locale. Links to folders
    are followed. Files and folders whose names start with a dot are left out.

    The list of a large folder is kept in the cache (`listing.py`). The list is made again when the
    modification time of the folder or of a folder below it changes, which happens when a file is
    added, removed or renamed. A file with changed contents is the same sample.

    Attributes:
        root: The folder.
        fingerprint: A hash of the relative paths in order.
    """

    kind = "a folder"

    def __init__(self, root: str | Path, *, where: str = "data.root") -> None:
        """Lists the folder.

        Args:
            root: The folder.
            where: Name of the configuration field that holds the root, for messages.

        Raises: DataError: if no image is below the folder, or a subfolder cannot be listed.
        """
        self.root, self._where = os.fspath(root), where
        self._listing = listed(
            "folder", self.root, make=partial(filled, (), self._fill), is_current=self._is_current
        )
        if not len(self._listing):
            raise DataError(
                f"{where}: no image in the folder or below it; got {self.root!r}, expected "
                f"files ending in {' '.join(EXTENSIONS)}. Set --{where} to a folder with such "
                "files."
            )
        self.fingerprint = self._listing.fingerprint
        if shards := self._listing.facts["num_tars"]:
            log.warning(
                "%s: %s holds %d .tar files beside images; only the images are read. "
                "To read the shards: --%s '%s/*.tar'",
                where,
                self.root,
                shards,
                where,
                self.root,
            )

    def __len__(self) -> int:
        return len(self._listing)

    def __getitem__(self, index: int) -> str:
        return os.path.join(self.root, self.name(index))

    def name(self, index: int) -> str:
        """Returns the path of image `index` below the root."""
        return os.fsdecode(self._listing.name(index))

    def read(self, index: int) -> bytearray:
        """Returns the bytes of image `index`; raises DataError if the file cannot be read."""
        return read_image(self[index])

    def labels(self) -> tuple[NDArray[np.int64], tuple[str, ...]]:
        """Returns the class of each image, (len,) int64, and the sorted names of the classes.

        Each subfolder of the root is a class, and an image may lie anywhere below the subfolder of
        its class. A class is an index into the names, as in torchvision's ImageFolder.

        Raises: DataError: if an image lies in no subfolder.
        """
        starts, names = [0], []
        while (start := starts[-1]) < len(self):
            first, slash, _ = self._listing.name(start).partition(b"/")
            if not slash:
                raise DataError(
                    f"{self._where}: an image without a class; got {self[start]!r}, expected a sub "
                    "folder for each class. Move the image into the folder of its class."
                )
            names.append(os.fsdecode(first))
            # The list is sorted, and "0" follows "/": the first name that is no longer below this.
            places = range(len(self))
            starts.append(bisect_left(places, first + b"0", lo=start, key=self._listing.name))
        classes = tuple(sorted(names))
        numbers = {name: number for number, name in enumerate(classes)}
        return np.repeat([numbers[name] for name in names], np.diff(starts)), classes

    def _fill(self, add: Add) -> dict[str, Any]:
        stamps, num_tars = [], 0
        for kind, path, modified in walk(self.root, self._where):
            if kind == "folder":
                stamps.append([path, modified])
            elif kind == "tar":
                num_tars += 1
            else:
                add(os.fsencode(path))
        newest = max(modified for _, modified in stamps)
        return {"stamps": stamps, "modified": newest, "num_tars": num_tars}

    def _is_current(self, facts: dict[str, Any]) -> bool:
        return all(
            os.stat(os.path.join(self.root, path)).st_mtime_ns == modified
            and settled(modified, facts["listed_at"])
            for path, modified in facts["stamps"]
        )


def open_folder(root: str, *, where: str) -> ImageFolder | None:
    """Opens the folder of images `root`, or returns None if `root` is not a folder.

    The arguments and errors are those of `ImageFolder`.
    """
    return ImageFolder(root, where=where) if local_kind(root, where=where) == "folder" else None


def read_image(path: str) -> bytearray:
    """Returns the bytes of the image file `path`.

    Raises: DataError: if the file cannot be read, or is larger than `MAX_FILE_BYTES`.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise OSError("not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise OSError(f"a file of {status.st_size} bytes")
            encoded = bytearray(status.st_size)
            del encoded[file.readinto(encoded) :]
            return encoded
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read; got {error.strerror or error}, expected an image. "
            "Restore the file or remove it from the folder."
        ) from error


class OpenFile:
    """An open file with many images, which is closed when its last reference is dropped.

    Reads do not use the offset of the file descriptor, since forked processes share this offset.

    Attributes:
        number: The file descriptor.
    """

    def __init__(self, path: str | Path) -> None:
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, offset: int, size: int) -> bytearray:
        """Returns the `size` bytes of an image at an offset of the file.

        Raises: OSError: if the bytes cannot be read, or `size` exceeds `MAX_FILE_BYTES`.
        """
        if size > MAX_FILE_BYTES:
            raise OSError(f"an image of {size} bytes")
        encoded = bytearray(size)
        done = os.preadv(self.number, [encoded], offset) if size else 0
        if done < size:
            raise OSError(f"{done} of {size} bytes")
        return encoded

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def paths_below(name: str) -> Iterator[tuple[str, ...]]:
    """Yields each path below a dataset's folder at which an image may lie, split into its parts.

    For the name "/data/cats/1.jpg" the paths are data/cats/1.jpg, cats/1.jpg and 1.jpg, since the
    first folders of a name may not exist on this disk. A leading "/" and every ".." are dropped, so
    that no name leads outside of the folder. Links are followed as usual. A name longer than 4,096
    characters, or with a zero byte, has no paths.
    """
    if len(name) > _LONGEST_NAME or "\0" in name:
        return
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    for start in range(len(parts)):
        yield tuple(parts[start:])


def read_below(folder: str, name: str) -> bytearray:
    """Returns the bytes of an image that a file of a dataset, in `folder`, refers to by name.

    The image is looked up at each path of `paths_below`.

    Raises: DataError: if the image is missing or cannot be read.
    """
    for parts in paths_below(name):
        with suppress(DataError):
            return read_image(os.path.join(folder, *parts))
    raise DataError(
        f"{folder}: no such image below this folder; got {name[:200]!r}, expected a file that can "
        "be read. Put the image there, or write the dataset with the images inside it."
    )


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # A named pipe would wait for a writer.


def walk(root: str, where: str) -> Iterator[tuple[str, str, int]]:
    """Yields every folder, image file and tar file below a folder.

    Paths are relative to `root` with "/" between the parts, and are yielded in the order of their
    bytes. A folder is sorted by its name with a "/" at the end, so that the names of only one
    folder need sorting at a time. Links to a folder that the path is already in are left out.

    Args:
        root: The folder.
        where: Name of the configuration field that holds the root, for messages.

    Yields: "folder", "image" or "tar"; the path; the modification time of a folder in ns since the
        epoch, or 0 for a file.
    Raises: DataError: if a folder cannot be listed, since its missing images would go unnoticed.
    """
    pending: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(b"", frozenset())]
    while pending:
        name, above = pending.pop()
        if name and not name.endswith(b"/"):
            path = os.fsdecode(name)
            yield "tar" if path.lower().endswith(".tar") else "image", path, 0
            continue
        folder = os.fsdecode(name)
        try:
            status = os.stat(os.path.join(root, folder))
            identity = (status.st_dev, status.st_ino)
            if identity in above:  # A link to a parent folder would be followed without end.
                continue
            with os.scandir(os.path.join(root, folder)) as entries:
                names = sorted(map(os.fsencode, _wanted(entries)), reverse=True)
        except OSError as error:
            raise DataError(
                f"{where}: a folder cannot be listed; got {error.strerror or error} for "
                f"{os.path.join(root, folder)!r}, expected a readable folder. Correct the "
                "permissions of this folder, or remove it."
            ) from error
        yield "folder", folder, status.st_mtime_ns
        here = above | {identity}
        pending += [(name + entry, here) for entry in names]


def _wanted(entries: Iterator[os.DirEntry[str]]) -> Iterator[str]:
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield f"{entry.name}/"
        elif entry.name.lower().endswith((*EXTENSIONS, ".tar")) and (
            # A broken link is listed, so that its name is reported.
            entry.is_file() or entry.is_symlink()
        ):
            yield entry.name

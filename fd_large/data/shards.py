"""Source of the images in local tar shards, which are read in place without unpacking."""

from __future__ import annotations

import glob
import hashlib
import logging
import math
import os
import resource
import time
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fd_large.data.folder import EXTENSIONS, OpenFile, walk
from fd_large.data.listing import Add, filled, listed, settled
from fd_large.data.roots import BRACES, GLOB, expand_braces, local_kind
from fd_large.data.tar_index import NO_LABEL, images_in
from fd_large.errors import DataError
from fd_large.files import kind_of
from fd_large.ranks import meeting

log = logging.getLogger(__name__)

# Largest number of shards that a process keeps open, and the time after which an open shard is
# compared again with its index.
MOST_OPEN = 2048
CHECK_SECONDS = 60.0


class TarShards:
    """`ImageSource` of the images in some tar files; `shards[i]` is "TAR_FILE/MEMBER" of image i.

    Images are sorted by the names of their members over all shards, and members of equal name by
    the order of the shards. So a folder of images and tar files with the same images are the same
    dataset, whichever images are in which tar file.

    A truncated or damaged shard is used up to its damage, and is named in `torn` and in the log.
    The index of all shards is kept in the cache (`listing.py`). The index is made again when the
    list of shards, or the size or modification time of a shard, changes.

    Attributes:
        paths: The paths of the tar files.
        sizes_and_times: Size in bytes and modification time in ns of each shard.
        torn: A message for each truncated or damaged shard.
        fingerprint: A hash of the names of the images in order.
    """

    kind = "tar shards"

    def __init__(self, root: str | Sequence[str], *, where: str = "data.root") -> None:
        """Indexes the shards.

        Args:
            root: A tar file, a pattern of tar files, a folder with tar files, or a list of paths of
                tar files.
            where: Name of the configuration field that holds the root, for messages.

        Raises: DataError: if a shard is missing, unreadable or compressed, or no shard has an
            image.
        """
        self._root, self._where = root, where
        self._anchor, self._rest = _anchor(root)
        # Paths are kept relative to this folder, so that the run's working folder does not matter.
        is_folder = kind_of(self._anchor) == "folder"
        self._folder = self._anchor if is_folder else os.path.dirname(self._anchor)
        self._listing = listed(
            f"tar files {self._rest}".rstrip(),
            self._anchor,
            make=partial(filled, ("offset", "size", "shard", "label"), self._fill),
            is_current=self._is_current,
        )
        facts = self._listing.facts
        self.paths = [os.path.join(self._folder, path) for path in facts["paths"]]
        self.fingerprint = self._listing.fingerprint
        self.sizes_and_times: list[list[int]] = facts["shards"]
        self._files = _Files()
        self.torn: tuple[str, ...] = tuple(facts["torn"])
        for message in self.torn:
            log.warning("%s", message)
        if not len(self._listing):
            others = f" and {len(self.paths) - 1} other tar files" if len(self.paths) > 1 else ""
            torn = f" ({'; '.join(self.torn)})" if self.torn else ""
            raise DataError(
                f"{where}: no image in {self.paths[0]}{others}{torn}; got members of other kinds "
                f"or none, expected names ending in {' '.join(EXTENSIONS)}. Set --{where} to "
                "tar files of images."
            )

    def __len__(self) -> int:
        return len(self._listing)

    def __getitem__(self, index: int) -> str:
        return f"{self.paths[self._listing.number('shard', index)]}/{self.name(index)}"

    def name(self, index: int) -> str:
        """Returns the name of the tar member that holds image `index`."""
        return os.fsdecode(self._listing.name(index))

    def read(self, index: int) -> bytearray:
        """Returns the bytes of image `index`.

        Raises: DataError: if the shard cannot be read or has changed since it was indexed.
        """
        number, offset, size = (
            self._listing.number(column, index) for column in ("shard", "offset", "size")
        )
        try:
            return self._files.read(self.paths[number], self.sizes_and_times[number], offset, size)
        except OSError as error:
            raise DataError(
                f"{self[index]}: cannot be read; got {error.strerror or error}, expected an "
                "image. Restore the shard, or start again to index it anew."
            ) from error

    def labels(self) -> tuple[NDArray[np.int64], None]:
        """Returns the label of each image, (len,) int64, and None, since classes have no names.

        Raises: DataError: if an image has no label.
        """
        labels = self._listing.arrays["label"]
        if len(without := np.flatnonzero(labels == NO_LABEL)):
            raise DataError(
                f"{self._where}: an image without a label; got {self[int(without[0])]}, expected "
                "KEY.cls, a whole number from 0 up, beside each KEY.jpg. Write the shards with "
                "labels, or use class folders."
            )
        return labels, None

    def _fill(self, add: Add) -> dict[str, Any]:
        entries: list[tuple[bytes, int, int, int, int]] = []
        paths, torn, shards = _shards_of(self._root, self._where), [], []
        for number, path in enumerate(paths):
            try:
                with open(path, "rb", buffering=0) as file:
                    shards.append(_size_and_time(os.fstat(file.fileno())))
                    images, wrong = images_in(file, path, where=self._where)
            except OSError as error:
                raise DataError(
                    f"{self._where}: a shard cannot be read; got {error.strerror or error} for "
                    f"{path!r}, expected a tar file. Correct its permissions or leave it out."
                ) from error
            torn += [wrong] if wrong else []
            entries += [(name, number, *numbers) for name, *numbers in images]
        for name, number, offset, size, label in sorted(entries):
            add(name, offset, size, number, label)
        return {"torn": torn, "paths": self._below(paths), "shards": shards}

    def _is_current(self, facts: dict[str, Any]) -> bool:
        paths = _shards_of(self._root, self._where)
        return self._below(paths) == facts["paths"] and all(
            _size_and_time(os.stat(path)) == known and settled(known[1], facts["listed_at"])
            for path, known in zip(paths, facts["shards"], strict=True)
        )

    def _below(self, paths: Sequence[str]) -> list[str]:
        return [os.path.relpath(path, self._folder or os.curdir) for path in paths]


class _Files:
    """Cache of one process's open shards, which closes the least recently used shard first.

    Opening a shard for each image would burden a parallel file system as much as single image files
    do. An open file does not show that the file at its path was replaced, so that size and time of
    the file at the path are compared with the index every `CHECK_SECONDS`.
    """

    def __init__(self) -> None:
        # path -> descriptor, and when its shard was last found to be the one that was indexed.
        self._open: OrderedDict[str, tuple[OpenFile, float]] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Files, ()

    def read(self, path: str, indexed: list[int], offset: int, size: int) -> bytearray:
        """Reads bytes of a shard; after a failed read, opens the shard again for a second read.

        `indexed` is the shard's size and modification time when it was indexed.

        Raises: OSError: if the bytes cannot be read, or the shard has changed since it was indexed.
        """
        try:
            return self._file(path, indexed).read(offset, size)
        except OSError:
            if self._open.pop(path, None) is None:
                raise  # The shard could not be opened, or has changed.
            return self._file(path, indexed).read(offset, size)

    def _file(self, path: str, indexed: list[int]) -> OpenFile:
        now = time.monotonic()
        file, checked = self._open.pop(path, (None, -math.inf))
        if file is None:
            file = OpenFile(path)
            self._check(os.fstat(file.number), indexed)
            checked = now
        elif now - checked > CHECK_SECONDS:
            self._check(os.stat(path), indexed)
            checked = now
        self._open[path] = file, checked
        while len(self._open) > _most_open():
            self._open.popitem(last=False)
        return file

    def _check(self, status: os.stat_result, indexed: list[int]) -> None:
        if _size_and_time(status) != indexed:
            raise OSError("a shard that changed since it was indexed")


def _most_open() -> int:
    """Returns half of the process's limit of open files, but at most `MOST_OPEN`."""
    return min(MOST_OPEN, max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))


def open_shards(root: str, *, where: str) -> TarShards | None:
    """Opens a tar file, a pattern of tar files, or a folder with tar files and no image files.

    The result is None if the root is something else.

    Raises: DataError: if a file of the pattern is missing, or the shards cannot be used.
    """
    kind = local_kind(root, where=where)
    if kind == "folder":
        has_shards = meeting.once(f"shards in {root}", lambda: bool(_shards_of(root, where)))
    elif kind == "file":
        has_shards = root.lower().endswith(".tar")
    else:
        has_shards = _is_pattern(root)
    return TarShards(root, where=where) if has_shards else None


def _shards_of(root: str | Sequence[str], where: str) -> list[str]:
    """Returns the paths of the tar files that a root of `TarShards` stands for.

    The result is empty for a folder without tar files, or with an image file.
    """
    if not isinstance(root, str):
        return list(root)
    if local_kind(root, where=where) == "folder":
        return _only_shards(root, where)
    return _matching(root, where) if _is_pattern(root) else [root]


def _is_pattern(root: str) -> bool:
    return local_kind(root) != "file" and bool(BRACES.search(root) or GLOB.search(root))


def _anchor(root: str | Sequence[str]) -> tuple[str, str]:
    """Returns a path without braces and wildcards for a root, and a text that completes the path.

    The text differs between roots with the same path. For a file or a folder, path and text are the
    root and "". For a pattern, they are the folder before the first brace or wildcard, and the rest
    of the pattern. For a list, they are its first path, and a hash of all paths.
    """
    if not isinstance(root, str):
        return root[0], hashlib.sha256("\0".join(root).encode()).hexdigest()
    if not _is_pattern(root):
        return root, ""
    start = min(match.start() for find in (BRACES, GLOB) if (match := find.search(root)))
    folder = os.path.dirname(root[:start])
    return folder or os.curdir, root[len(folder) :].lstrip("/")


def _matching(pattern: str, where: str) -> list[str]:
    paths: list[str] = []
    for name in expand_braces(pattern, where=where):
        files = sorted(glob.glob(name)) if GLOB.search(name) else [name]
        kinds = {kind_of(path, where=where, of=DataError) for path in files}
        if kinds != {"file"}:
            raise DataError(
                f"{where}: no such tar file; got {name!r} from {pattern!r}, expected a file. Set "
                f"--{where} to a pattern of existing files."
            )
        paths += files
    return list(dict.fromkeys(paths))


def _only_shards(root: str, where: str) -> list[str]:
    """Returns the paths of the tar files below the folder `root`; empty if it has image files."""
    shards = []
    for kind, path, _ in walk(root, where):
        if kind == "image":
            return []
        if kind == "tar":
            shards.append(os.path.join(root, path))
    return shards


def _size_and_time(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns]

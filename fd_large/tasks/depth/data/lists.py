"""Reads lists of images and depth files, in the format of the published NYUv2 and KITTI runs.

A line has the path of an image, the path of its depth file, and optional further columns, as in
"/kitchen_0028b/rgb_00045.jpg /kitchen_0028b/sync_depth_00045.png 518.8579". Images whose depth
file is "None", as in KITTI's test list, are left out.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, overload

import numpy as np

from fd_large.data.folder import paths_below
from fd_large.data.listing import Add, Listing, filled, listed, settled
from fd_large.errors import DataError
from fd_large.files import kind_of, read_bytes
from fd_large.tasks.dense.pairs import Pairs

log = logging.getLogger(__name__)

DEFAULT_NAMES = {"train": ("train_list.txt",), "val": ("test_list.txt", "val_list.txt")}
"""For each split the file names of lists that are looked for in the dataset's folder, in order."""
FOLDERS = ("", "sync", "official_splits/test", "raw_data", "data_depth_annotated")
"""Folders, relative to the dataset's folder, to which the paths in a list may be relative: those
of NYUv2 and KITTI as prepared by BTS and by GLPDepth."""
NO_DEPTH = "None"
# Largest number of missing files that a message names.
NAMED = 3


class _Paths(Sequence[str]):
    """The paths of the images in a listing, or of their depth files, as a sequence.

    Args:
        listing: A listing in which each name consists of two paths, separated by a newline.
        root: Folder of the dataset, to which the paths are relative.
        part: 0 for images, 1 for depth files.
    """

    def __init__(self, listing: Listing, root: str, part: int) -> None:
        self._listing, self._root, self._part = listing, root, part

    def __len__(self) -> int:
        return len(self._listing)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name = self._listing.name(index).split(b"\n")[self._part]
        return os.path.join(self._root, os.fsdecode(name))


def default_list(root: str, split: str) -> str:
    """Returns the path of the list of a split's images in the dataset's folder.

    Args:
        root: Folder of the dataset.
        split: "train" or "val".

    Returns: the first file in `root` that has a name in `DEFAULT_NAMES[split]`; "" if there is
        none.
    """
    for name in DEFAULT_NAMES[split]:
        if kind_of(path := os.path.join(root, name)) == "file":
            return path
    return ""


def pairs_of_list(path: str, root: str, *, where: str, of_root: str) -> Pairs:
    """Returns the paths of the images and depth files in a list, and checks that they exist.

    Args:
        path: Path of the list.
        root: Folder of the dataset.
        where: The field that names the list, for messages.
        of_root: The field that names the dataset's folder, for messages.

    Raises: DataError: if the list cannot be used, or if a file in it is missing.
    """
    if kind_of(path, where=where, of=DataError) != "file":
        raise DataError(
            f"{where}: cannot be read; got {path!r}, which is not a file, expected a text file of "
            f'lines "IMAGE DEPTH", paths below {root}. Set --{where} to such a file.'
        )
    status = os.stat(path)
    stamp = [status.st_mtime_ns, status.st_size]

    def fill(add: Add) -> dict[str, Any]:
        for image, depth in _found(_lines(path, where), path, root, of_root):
            add(os.fsencode(image) + b"\n" + os.fsencode(depth))
        return {"stamp": stamp}

    listing = listed(
        f"depths in {root}",
        path,
        make=partial(filled, (), fill),
        is_current=lambda facts: facts["stamp"] == stamp and settled(stamp[0], facts["listed_at"]),
    )
    images, depths = (_Paths(listing, root, part) for part in (0, 1))
    places = np.arange(len(listing)).repeat(2).reshape(-1, 2)
    return Pairs(images, depths, places, listing.fingerprint, root)


def _lines(path: str, where: str) -> list[tuple[str, str]]:
    """Returns (path of the image, path of the depth file) for each line of a list.

    Lines whose depth file is "None" are left out, and counted in the log. The paths have no leading
    slash.

    Args:
        path: Path of the list.
        where: The field that names the list, for messages.

    Raises:
        DataError: if the list cannot be read, has an invalid line, or has no image with a depth
            file.
    """
    pairs, without = [], 0
    text = read_bytes(path, where=where, of=DataError).decode(errors="surrogateescape")
    for number, line in enumerate(text.split("\n"), 1):
        words = line.split()
        if not words:
            continue
        if len(words) < 2:
            raise DataError(
                f"{where}: invalid line; got {line.strip()!r} as line {number} of {path}, "
                'expected "IMAGE DEPTH". Correct the list.'
            )
        if words[1] == NO_DEPTH:
            without += 1
        else:
            pairs.append((_below(words[0]), _below(words[1])))
    if not pairs:
        raise DataError(
            f"{where}: an empty list; got no image with a depth file in {path}, expected lines "
            '"IMAGE DEPTH". Name another list.'
        )
    if without:
        log.info("%s: %d images of %s have no depth file and are left out", where, without, path)
    return pairs


def _below(name: str) -> str:
    """Returns the path `name` of a list without a leading "/" and without any "..".

    The result is therefore below the dataset's folder. It is "" if nothing is left of `name`, if
    `name` has a null character, or if `name` is too long for a path.
    """
    return "/".join(next(paths_below(name), ()))


def _found(
    pairs: list[tuple[str, str]], path: str, root: str, of_root: str
) -> Iterator[tuple[str, str]]:
    """Checks that all files in a list exist, and yields the pairs of paths relative to the root.

    To find the files, each folder is listed once, in place of a request for each file.

    Args:
        pairs: Result of `_lines`.
        path: Path of the list, for messages.
        root: Folder of the dataset.
        of_root: The field that names the dataset's folder, for messages.

    Raises: DataError: if a file is missing.
    """
    starts = [_start(root, names) for names in zip(*pairs, strict=True)]
    inside: dict[str, frozenset[str]] = {}
    missing = []
    whole = [
        tuple(os.path.join(start, name) for start, name in zip(starts, pair, strict=True))
        for pair in pairs
    ]
    for name in (name for pair in whole for name in pair):
        folder, file = os.path.split(name)
        if folder not in inside:
            try:
                inside[folder] = frozenset(os.listdir(os.path.join(root, folder)))
            except OSError:
                inside[folder] = frozenset()
        if file not in inside[folder]:
            missing.append(name)
    if missing:
        raise DataError(
            f"{of_root}: files of {path} are missing in {root}; got no file for {len(missing)} of "
            f"{2 * len(pairs)} ({', '.join(missing[:NAMED])}), expected all files. Unpack these "
            "files there, or remove their lines from the list."
        )
    yield from whole


def _start(root: str, names: Sequence[str]) -> str:
    """Returns the folder to which the paths in a list are relative, an entry of `FOLDERS`.

    It is the first entry for which the folder of the first path exists, at
    `root`/entry/dirname(`names[0]`). If there is no such entry, the result is "", which stands for
    `root` itself.

    Args:
        root: Folder of the dataset.
        names: Paths in the list, either those of images or those of depth files.
    """
    for folder in FOLDERS:
        if kind_of(os.path.join(root, folder, os.path.dirname(names[0]))) == "folder":
            return folder
    return ""

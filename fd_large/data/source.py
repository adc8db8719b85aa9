"""Where the images of a run come from: `open_images` decides between folder and tar shards."""

from __future__ import annotations

import glob
import os
import re
from itertools import product
from typing import Protocol

from fd_large.data.folder import ImageFolder, walk
from fd_large.data.photographs import PREFIX, open_builtin
from fd_large.data.shards import TarShards
from fd_large.errors import DataError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_GLOB = re.compile(r"[*?\[]")


class ImageSource(Protocol):
    """What a set of images has to offer; it must survive pickling.

    A sample is a number; what belongs to it besides the image (a label, say) is a further
    method by that number.
    """

    fingerprint: str
    """A hash of the samples' names in order: equal on all ranks, and when a run goes on."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str:
        """Says where image `index` lies, for a message."""

    def read(self, index: int) -> bytes | bytearray:
        """Reads the bytes of image `index`; DataError if that fails."""


def open_images(root: str, *, where: str = "data.root") -> ImageSource:
    """The images that `data.root`, or another field, names.

    Args:
        root: A folder of images, sub folders included; a folder that holds tar files and no
            loose image; one tar file; a pattern of tar files, as "train-{0000..0146}.tar" or
            "train-*.tar"; or a set that comes along, "builtin:photographs".
        where: The field that names them, for messages.

    Raises: DataError: if there is nothing of the kind, or no image in it.
    """
    if root.startswith(PREFIX):
        return open_builtin(root, where=where)
    if os.path.isdir(root):
        if shards := _only_shards(root, where):
            return TarShards(shards, where=where)
        return ImageFolder(root, where=where)
    if os.path.isfile(root):
        if not root.lower().endswith(".tar"):
            raise DataError(
                f"{where}: neither a folder nor a tar file; got {root!r}, expected a folder of "
                f"images, or FILE.tar. Set --{where} FOLDER."
            )
        return TarShards([root], where=where)
    if _BRACES.search(root) or _GLOB.search(root):
        return TarShards(_matching(root, where), where=where)
    return ImageFolder(root, where=where)  # says what is wrong


def expand_braces(pattern: str) -> list[str]:
    """Writes out "{00..12}" (leading zeros kept) and "{a,b}"; no nesting."""
    pieces = _BRACES.split(pattern)  # text, inside, text, inside, ..., text
    choices = [[piece] if i % 2 == 0 else _choices(piece) for i, piece in enumerate(pieces)]
    return ["".join(parts) for parts in product(*choices)]


def _choices(inside: str) -> list[str]:
    if match := _RANGE.fullmatch(inside):
        first, last = match.groups()
        step = 1 if int(first) <= int(last) else -1
        numbers = range(int(first), int(last) + step, step)
        return [str(number).zfill(len(first)) for number in numbers]
    return inside.split(",") if "," in inside else [f"{{{inside}}}"]


def _matching(pattern: str, where: str) -> list[str]:
    paths: list[str] = []
    for name in expand_braces(pattern):
        found = sorted(glob.glob(name)) if _GLOB.search(name) else [name]
        missing = not found or not os.path.isfile(found[0])
        if missing:
            raise DataError(
                f"{where}: no such tar file; got {name!r} from {pattern!r}, expected a file. "
                f"Set --{where} to a pattern of files that are there."
            )
        paths += found
    return list(dict.fromkeys(paths))


def _only_shards(root: str, where: str) -> list[str]:
    """The tar files below a folder that holds no loose image; else nothing."""
    shards = []
    for kind, path, _ in walk(root, where):
        if kind == "picture":
            return []
        if kind == "tar":
            shards.append(os.path.join(root, path))
    return shards

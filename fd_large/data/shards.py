"""Images in tar shards, read in place: nothing is unpacked.

WebDataset's naming (KEY.jpg, KEY.cls, KEY.json ...) and any other tar of images do: every member
with an image's extension is a sample, other members are passed over. KEY is the name up to the
first dot after the last slash, and KEY.cls holds a label as a decimal number.
"""

from __future__ import annotations

import glob
import logging
import os
import re
from collections.abc import Sequence
from copy import copy
from functools import partial
from itertools import product
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from fd_large.data.folder import EXTENSIONS, MAX_FILE_BYTES, walk
from fd_large.data.listing import Add, listed, settled
from fd_large.data.tar_index import Torn, members
from fd_large.errors import DataError

log = logging.getLogger(__name__)

_ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
# A label is a decimal number; what is longer is none.
_MAX_LABEL_BYTES = 32
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_GLOB = re.compile(r"[*?\[]")


class TarShards:
    """The images in some tar files: `len(shards)`, `shards[i]` (its place), `shards.read(i)`.

    The order is that of the members' names over all shards (of equal names the shard's place
    decides), so that a folder and its tar files, however packed, are the same dataset.

    A shard that is cut or damaged is read as far as it is sound: `torn` says so for each, and the
    log. An index is kept in the cache (`listing.py`) and made again when the size or modification
    time of any shard changed, or their list.
    """

    def __init__(self, paths: Sequence[str], *, where: str = "data.root") -> None:
        """Indexes the shards.

        Args:
            paths: The tar files, at least one.
            where: The field that names them, for messages.

        Raises: DataError: if one cannot be read or is compressed, or none holds an image.
        """
        self.paths, self._where = list(paths), where
        self._listing = listed(
            f"shards {self._key()}",
            columns=("offset", "size", "shard"),
            fill=self._fill,
            is_current=self._is_current,
        )
        facts = self._listing.facts
        self.fingerprint = self._listing.fingerprint
        self.sizes_and_times: list[list[int]] = facts["shards"]
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
        name = os.fsdecode(self._listing.name(index))
        return f"{self.paths[self._listing.number('shard', index)]}/{name}"

    def read(self, index: int) -> bytearray:
        """The bytes of image `index`.

        Raises: DataError: if the shard cannot be read or is no longer the one that was indexed.
        """
        number = self._listing.number("shard", index)
        size = self._listing.number("size", index)
        try:
            if size > MAX_FILE_BYTES:
                raise OSError(f"a member of {size} bytes")
            with open(self.paths[number], "rb", buffering=0) as file:
                if _size_and_time(file) != self.sizes_and_times[number]:
                    raise OSError("a shard that changed since it was indexed")
                encoded = bytearray(size)
                done = os.preadv(file.fileno(), [encoded], self._listing.number("offset", index))
                if done < size:
                    raise OSError(f"{done} of {size} bytes")
                return encoded
        except OSError as error:
            raise DataError(
                f"{self[index]}: cannot be read; got {error.strerror or error}, expected an "
                "image. Restore the shard, or start again to index it anew."
            ) from error

    def labels(self) -> tuple[NDArray[np.int64], None]:
        """The label that stands beside each image, (len,).

        Raises: DataError: if an image has none.
        """
        listing = listed(
            f"labels {self._key()}",
            columns=("offset", "size", "shard", "label"),
            fill=partial(self._fill, with_labels=True),
            is_current=self._is_current,
        )
        if listing.fingerprint != self.fingerprint:
            raise DataError(
                f"{self._where}: shards changed while they were indexed; got another list of "
                f"images in {self.paths[0]} and the others, expected the same. Start again once "
                "they no longer change."
            )
        return listing.arrays["label"], None

    def at(self, paths: Sequence[str]) -> TarShards:
        """The same samples, read from copies of the shards.

        Args:
            paths: The copies, in the order of `self.paths`.
        """
        assert len(paths) == len(self.paths)
        moved = copy(self)
        moved.paths, moved.sizes_and_times = list(paths), []
        for path in paths:
            with open(path, "rb") as file:
                moved.sizes_and_times.append(_size_and_time(file))
        return moved

    def _key(self) -> str:
        return "\n".join(os.path.realpath(path) for path in self.paths)

    def _fill(self, add: Add, *, with_labels: bool = False) -> dict[str, Any]:
        found: list[tuple[Any, ...]] = []
        torn, shards = [], []
        for number, path in enumerate(self.paths):
            images: list[tuple[bytes, int, int]] = []
            labels: dict[bytes, int] = {}
            try:
                with open(path, "rb", buffering=0) as file:
                    shards.append(_size_and_time(file))
                    self._refuse_compressed(path, os.pread(file.fileno(), 2, 0))
                    for name, offset, size in members(file):
                        if name.startswith(b".") or b"/." in name:
                            continue
                        if name.lower().endswith(_ENDINGS):
                            images.append((name, offset, size))
                        elif with_labels and name.endswith(b".cls"):
                            text = os.pread(file.fileno(), min(size, _MAX_LABEL_BYTES), offset)
                            labels[_sample(name)] = self._label(text, path, name)
            except Torn as error:
                torn.append(
                    f"{path}: a shard that is not whole: {error}; {len(images)} images before "
                    "that are used. Fetch or write the shard again."
                )
            except OSError as error:
                raise DataError(
                    f"{self._where}: a shard cannot be read; got {error.strerror or error} for "
                    f"{path!r}, expected a tar file. Mend its permissions or leave it out."
                ) from error
            for name, offset, size in images:
                label = [self._found(labels, path, name)] if with_labels else []
                found.append((name, number, offset, size, *label))
        for name, number, offset, size, *label in sorted(found):
            add(name, offset, size, number, *label)
        return {"torn": torn, "shards": shards}

    def _is_current(self, facts: dict[str, Any]) -> bool:
        for path, (size, modified) in zip(self.paths, facts["shards"], strict=True):
            status = os.stat(path)
            if (status.st_size, status.st_mtime_ns) != (size, modified):
                return False
            if not settled(modified, facts["listed_at"]):
                return False
        return True

    def _refuse_compressed(self, path: str, start: bytes) -> None:
        if kind := _COMPRESSED.get(start):
            raise DataError(
                f"{self._where}: a compressed shard; got {kind} for {path!r}, expected a plain tar "
                "file, whose members can be read in place. Decompress it (images gain nothing)."
            )

    def _found(self, labels: dict[bytes, int], path: str, name: bytes) -> int:
        if _sample(name) not in labels:
            raise DataError(
                f"{self._where}: an image without a label; got {os.fsdecode(name)} in {path}, "
                "expected KEY.cls beside each KEY.jpg. Write the shards with labels, or use class "
                "folders."
            )
        return labels[_sample(name)]

    def _label(self, text: bytes, path: str, name: bytes) -> int:
        try:
            label = int(text)
        except ValueError:
            label = -1
        if label < 0:
            raise DataError(
                f"{self._where}: an invalid label; got {text[:20]!r} in {os.fsdecode(name)} of "
                f"{path}, expected a whole number from 0 up. Write the shard again."
            )
        return label


def open_shards(root: str, *, where: str) -> TarShards | None:
    """Opens a tar file, a pattern of them, or a folder that holds them and no loose image.

    Raises: DataError: if a file of the pattern is missing, or they cannot be used.
    """
    if os.path.isdir(root):
        paths = _only_shards(root, where)
    elif os.path.isfile(root):
        paths = [root] if root.lower().endswith(".tar") else []
    else:
        paths = _matching(root, where) if _BRACES.search(root) or _GLOB.search(root) else []
    return TarShards(paths, where=where) if paths else None


def expand_braces(pattern: str) -> list[str]:
    """Writes out "{00..12}" (leading zeros kept) and "{a,b}"; no nesting."""
    parts = _BRACES.split(pattern)  # text, inside, text, inside, ..., text
    choices = [[part] if i % 2 == 0 else _choices(part) for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


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
        if not found or not os.path.isfile(found[0]):
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
        if kind == "image":
            return []
        if kind == "tar":
            shards.append(os.path.join(root, path))
    return shards


def _size_and_time(file: BinaryIO) -> list[int]:
    status = os.fstat(file.fileno())
    return [status.st_size, status.st_mtime_ns]


def _sample(name: bytes) -> bytes:
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.partition(b".")[0]

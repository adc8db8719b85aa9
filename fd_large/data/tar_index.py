"""Indexes a tar archive: finds where its images lie, their labels, and damage of the archive.

Names of members may follow WebDataset's rules (KEY.jpg, KEY.cls, KEY.json ...) or any others. Every
member with an image's extension is a sample. KEY is the name up to the first dot after the last
slash, and the member KEY.cls has the image's label as a decimal number. Other members are ignored.

Python's tarfile ends silently at a damaged header. Here an archive ends only at the block of zeros
with which every archive ends, and anything else that is not a header raises `Torn`.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

from fd_large.data.folder import EXTENSIONS
from fd_large.errors import DataError, without_secrets

NO_LABEL = -1
_ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}
# Longest label in bytes; a label is a decimal number.
_MAX_LABEL_BYTES = 32
# Archives are padded to a multiple of the record, 10 kB by default.
_MAX_PADDING = 1 << 20


class Member(NamedTuple):
    """A regular file in an archive, at the bytes [offset, offset + size) of the archive."""

    name: bytes
    offset: int
    size: int


class Torn(Exception):
    """Error for a damaged or truncated archive, whose message has the offset and the damage."""


class TarImage(NamedTuple):
    """An image in an archive, at the bytes [offset, offset + size) of the archive.

    The label is the number in the archive's member KEY.cls, where KEY is `name` up to the first dot
    after the last slash; `NO_LABEL` without a valid number in such a member.
    """

    name: bytes
    offset: int
    size: int
    label: int


def images_in(file: BinaryIO, path: str, *, where: str) -> tuple[list[TarImage], str]:
    """Lists the images of an open archive, up to the first damage.

    A member is left out if its name, or the name of a folder in its path, starts with a dot.

    Args:
        file: The archive, at its beginning.
        path: Name of the archive for messages.
        where: Name of the configuration field that holds the dataset's root, for messages.

    Returns: the images in the archive's order; a message about the damage of the archive, or "".
    Raises: DataError: if the archive is compressed.
    """
    if kind := _COMPRESSED.get(os.pread(file.fileno(), 2, 0)):
        raise DataError(
            f"{where}: a compressed shard; got {kind} for {path!r}, expected a plain tar file, "
            "whose members can be read in place. Decompress the shard (compression saves nothing "
            "on images)."
        )
    images: list[Member] = []
    labels: dict[bytes, int] = {}
    torn = ""
    try:
        for member in members(file):
            name, offset, size = member
            if name.startswith(b".") or b"/." in name:
                continue
            if name.lower().endswith(_ENDINGS):
                images.append(member)
            elif name.endswith(b".cls"):
                text = os.pread(file.fileno(), min(size, _MAX_LABEL_BYTES), offset).strip()
                labels[_key(name)] = int(text) if text.isdigit() else NO_LABEL
    except Torn as error:
        torn = without_secrets(
            f"{path}: an incomplete shard: {error}; the {len(images)} images before that place "
            "are used. Fetch or write the shard again."
        )
    return [TarImage(*image, labels.get(_key(image.name), NO_LABEL)) for image in images], torn


def _key(name: bytes) -> bytes:
    """Returns the part of a member's name up to the first dot after the last slash."""
    folder, slash, last = name.rpartition(b"/")
    return folder + slash + last.partition(b".")[0]


class _Header(tarfile.TarInfo):
    @classmethod
    def frombuf(cls, *args: Any, **named: Any) -> tarfile.TarInfo:
        """Parses a header, with the arguments of tarfile's method of this name.

        Raises: InvalidHeaderError: if the header states a negative size, which tarfile accepts.
        """
        header = super().frombuf(*args, **named)
        if header.size < 0:
            raise tarfile.InvalidHeaderError(f"a size of {header.size}")
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        """Reads the next header; raises Torn at damage at which tarfile would end silently."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise  # The block of zeros ends every archive.
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):
            raise Torn(f"it ends at byte {archive.fileobj.tell()} without the end mark") from None
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            start = archive.fileobj.tell() - tarfile.BLOCKSIZE
            raise Torn(f"the header at byte {start} is damaged ({error})") from None


def members(file: BinaryIO) -> Iterator[Member]:
    """Yields the regular files of an open tar archive, reading headers alone.

    Raises: Torn: after the last whole member, if the archive is truncated or damaged, or the file
        is not a tar archive.
    """
    end = os.fstat(file.fileno()).st_size
    try:
        archive = tarfile.TarFile(fileobj=file, tarinfo=_Header, encoding="utf-8")
        while (info := archive.next()) is not None:
            archive.members.clear()  # Otherwise tarfile keeps all members in memory.
            regular, rest = info.isreg() and not info.issparse(), end - info.offset_data
            # A pax header may have another size than the header that `frombuf` reads.
            if info.size < 0 or archive.offset <= info.offset or (regular and info.size > rest):
                raise Torn(f"the member at byte {info.offset} has {rest} of {info.size} bytes")
            if regular:
                name = info.name.encode("utf-8", "surrogateescape")
                while name.startswith(b"./"):
                    name = name[2:]
                yield Member(name, info.offset_data, info.size)
    except tarfile.ReadError:
        raise Torn(f"it ends at byte {end} without the end mark") from None
    _check_tail(file.fileno(), archive.offset, end)


def _check_tail(descriptor: int, start: int, end: int) -> None:
    """Raises `Torn` if anything but padding follows the end of an archive.

    This finds concatenated archives, and files whose download has not finished. The archive ends at
    the offset `start`, and the file has `end` bytes.
    """
    if end - start > _MAX_PADDING:
        raise Torn(f"it ends at byte {start}, the file at byte {end}")
    if os.pread(descriptor, end - start, start).strip(b"\0"):
        raise Torn(f"it ends at byte {start}, and other data follow")

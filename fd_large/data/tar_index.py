"""Where the members of a tar archive lie, and whether the archive is whole.

Python's tarfile ends in silence at a header that is damaged. Here the end of an archive is the
block of zeros that every archive has; anything else in a header's place is a tear, and told.

Formats: ustar, GNU (long names), pax (path and size records): what tar, Python and webdataset
write. Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Header Block".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
_ZEROS = bytes(BLOCK)
# A long name or a pax record; what claims more is damage.
_MAX_EXTRA_BYTES = 1 << 20
# Archives are padded to a multiple of the record, 10 kB by default.
_MAX_PADDING = 1 << 20


class Member(NamedTuple):
    """A regular file in an archive: its bytes are [offset, offset + size) of the archive."""

    name: bytes
    offset: int
    size: int


class Torn(Exception):
    """An archive that does not go on where it should; the message says where and how."""


def members(descriptor: int) -> Iterator[Member]:
    """Yields the regular files of an open tar archive, reading headers alone.

    Args:
        descriptor: Of the archive's file; its offset is not moved.

    Raises: Torn: after the last whole member, if the archive is cut, damaged or no tar at all.
    """
    try:
        yield from _members(descriptor)
    except ValueError:  # a number that is none, under a checksum that holds
        raise Torn("a header holds no number where a size belongs") from None


def _members(descriptor: int) -> Iterator[Member]:
    end = os.fstat(descriptor).st_size
    at = 0
    name: bytes | None = None  # what extra headers say of the next member
    size: int | None = None
    while True:
        block = os.pread(descriptor, BLOCK, at)
        if block == _ZEROS:
            _check_tail(descriptor, at, end)
            return
        if len(block) < BLOCK:
            raise Torn(f"it ends at byte {end} without the end mark")
        if not _sound(block):
            raise Torn(f"the header at byte {at} is damaged (checksum)")
        kind = block[156:157]
        length = _number(block[124:136]) if size is None or kind in b"xgLK" else size
        start = at + BLOCK
        if length < 0 or start + length > end:
            raise Torn(f"the member at byte {at} has {end - start} of {length} bytes")
        at = start + -(-length // BLOCK) * BLOCK
        if kind in (b"L", b"K", b"x", b"g"):
            if length > _MAX_EXTRA_BYTES:
                raise Torn(f"the header at byte {start - BLOCK} claims {length} bytes")
            extra = os.pread(descriptor, length, start)
            if kind == b"L":
                name = extra.rstrip(b"\0")
            elif kind == b"x":
                records = _pax_records(extra)
                name = records.get(b"path", name)
                if b"size" in records:
                    size = int(records[b"size"])
            continue
        if kind in (b"0", b"\0", b"7"):
            yield Member(_plain(name or _name_in(block)), start, length)
        name = size = None


def _check_tail(descriptor: int, start: int, end: int) -> None:
    """Refuses what is no padding: archives strung together, holes of an unfinished download."""
    if end - start > _MAX_PADDING:
        raise Torn(f"it ends at byte {start}, the file at byte {end}")
    tail = os.pread(descriptor, end - start, start)
    if tail.strip(b"\0"):
        raise Torn(f"it ends at byte {start}, and other data follow")


def _sound(block: bytes) -> bool:
    """Whether the sum of a header's bytes, its own field as blanks, is what the field says."""
    try:
        told = _number(block[148:156])
    except ValueError:
        return False
    rest = block[:148] + block[156:]
    total = sum(rest) + 8 * 0x20
    return told in (total, total - 256 * sum(byte > 127 for byte in rest))  # old tars: signed


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: base 256, big endian
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    return int(field.split(b"\0")[0].strip() or b"0", 8)


def _name_in(block: bytes) -> bytes:
    name, prefix = block[:100].split(b"\0")[0], block[345:500].split(b"\0")[0]
    is_posix = block[257:263] == b"ustar\0"  # GNU's own format has other things in that place
    return prefix + b"/" + name if is_posix and prefix else name


def _plain(name: bytes) -> bytes:
    while name.startswith(b"./"):
        name = name[2:]
    return name


def _pax_records(extra: bytes) -> dict[bytes, bytes]:
    """Records "LENGTH KEY=VALUE\\n"; what cannot be read ends them."""
    records, at = {}, 0
    while at < len(extra):
        blank = extra.find(b" ", at)
        if blank < 0 or not extra[at:blank].isdigit() or int(extra[at:blank]) <= blank - at:
            break
        end = at + int(extra[at:blank])
        key, _, value = extra[blank + 1 : end - 1].partition(b"=")
        records[key], at = value, end
    return records

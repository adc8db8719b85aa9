"""Images in a column of parquet files, on a disk or behind a URL, read in blocks of a row group.

The column holds the bytes of image files, or what Hugging Face `datasets` writes: a struct of bytes
and path. The order is that of the files' names, and in a file that of its rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fd_large.data.blocks import BlockImages, BlockWriter
from fd_large.data.folder import MAX_FILE_BYTES, read_below
from fd_large.data.objects import RANGE_BYTES, STREAMS, Stored, find, find_objects
from fd_large.data.packages import PARQUET, is_url, listed, local_kind, name_of, require
from fd_large.errors import DataError, FDError, first_line
from fd_large.ranks import meeting

_ROWS = 64


class ParquetImages(BlockImages):
    """The images of some parquet files; `open_parquet` opens them."""

    def __init__(self, root: str, files: Sequence[Stored], *, where: str) -> None:
        """Reads the ends of the files, which say where the row groups lie.

        Args:
            root: Their name, for messages.
            files: The files.
            where: The field that names them, for messages.

        Raises: DataError: if a file is damaged, holds no column of images, or all are empty.
        """
        self.root, self._where = root, where
        table = meeting.once(f"rows of {root}", lambda: _looked_at(files, where))
        if not len(table.rows):
            raise DataError(
                f"{where}: no image in the parquet files; got {root!r} without rows, expected at "
                "least one. Name other files."
            )
        super().__init__(
            files,
            file_of=table.files,
            parts=table.groups,
            sizes=table.rows,
            num_bytes=table.num_bytes,
            fingerprint=table.fingerprint,
            kind=f"{len(table.rows)} row groups of {len(files)} parquet files",
        )
        self._columns = table.columns
        if self._columns.label is not None:
            self.labels = self._labels

    def _make(self, stored: Stored, part: int, writer: BlockWriter) -> None:
        import pyarrow.parquet as pq

        from fd_large.data.columns import cells

        with stored.open() as file:
            try:
                table = pq.ParquetFile(file, pre_buffer=False, buffer_size=RANGE_BYTES)
                _refuse_large_cells(stored, table.metadata.row_group(part), self._columns.image)
                row = 0
                for batch in table.iter_batches(
                    _ROWS, row_groups=[part], columns=[self._columns.image],
                    use_threads=False,
                ):  # fmt: skip
                    for encoded, path in cells(batch.column(0)):
                        if encoded is None:
                            encoded = _beside(stored, path)
                        name, size = f"{part}/{row}".encode(), len(encoded)
                        if size > MAX_FILE_BYTES:  # Whoever reads it is told its size.
                            writer.note(name, 0, size)
                        else:
                            writer.add(name, encoded)
                        row += 1
            except Exception as error:  # Arrow's, on damaged bytes; a store's are FDErrors.
                raise _damaged(stored, error) from error

    def _labels(self) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
        """The class of each image, (len,), and the names of the classes or None."""
        return meeting.once(f"labels of {self.root}", self._read_labels)

    def _read_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        from fd_large.data.columns import labels_of

        columns = self._columns

        def column_of(stored: Stored) -> pa.ChunkedArray:
            with stored.open() as file:
                table = pq.ParquetFile(file, pre_buffer=False)
                return table.read([columns.label], use_threads=False).column(0)

        with ThreadPoolExecutor(STREAMS) as pool:
            parts = list(pool.map(column_of, self.files))
        return labels_of(
            pa.chunked_array([chunk for part in parts for chunk in part.chunks]),
            columns,
            self._where,
        )


def open_parquet(root: str, *, where: str) -> ParquetImages | None:
    """Opens a parquet file, a pattern of them, or a folder or URL that holds them.

    Raises: DataError: if a file is missing or damaged, or a package is.
    """
    named = name_of(root).lower().endswith(PARQUET)
    if is_url(root):
        files = [f for f in find_objects(root, where) if name_of(f.url).lower().endswith(PARQUET)]
    elif named or _holds_parquet(root, where):
        files = meeting.once(f"parquet files of {root}", lambda: find(root, (PARQUET,), where))
    else:
        return None
    if not files:
        if is_url(root) and not named:
            return None
        raise DataError(
            f"{where}: no such parquet file; got {root!r}, expected at least one. Correct the name."
        )
    require("pyarrow", "parquet files", where)
    return ParquetImages(root, files, where=where)


def _holds_parquet(root: str, where: str) -> bool:
    """Whether a local folder, or its folder `data`, has parquet files in it."""
    if local_kind(root, where=where) != "folder":
        return False

    def look() -> bool:
        folders = [root]
        if local_kind(root, "data", where=where) == "folder":
            folders.append(os.path.join(root, "data"))
        names = (name for folder in folders for name in listed(folder, where))
        return any(name.lower().endswith(PARQUET) for name in names)

    return bool(meeting.once(f"parquet in {root}", look))


class _Table(NamedTuple):
    """What the ends of the files say; per row group that has rows: file, number, rows, bytes."""

    files: NDArray[np.int64]
    groups: NDArray[np.int64]
    rows: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    columns: Any
    fingerprint: str


def _looked_at(files: Sequence[Stored], where: str) -> _Table:
    import pyarrow.parquet as pq

    from fd_large.data.columns import find_columns

    def look(stored: Stored) -> tuple[Any, Any, list[tuple[int, int]]]:
        try:
            with stored.open() as file:
                opened = pq.ParquetFile(file, pre_buffer=False)
                schema, facts = opened.schema_arrow, opened.metadata
                columns = find_columns(schema, stored.url)
                groups = []
                for number in range(facts.num_row_groups):
                    group = facts.row_group(number)
                    groups.append((group.num_rows, _bytes_of(group, columns.image)))
                return columns, groups
        except Exception as error:  # Arrow's, on damaged bytes; a store's are FDErrors.
            raise _damaged(stored, error) from error

    try:
        with ThreadPoolExecutor(STREAMS) as pool:
            found = list(pool.map(look, files))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    columns, digest, table = found[0][0], hashlib.sha256(), []
    folder = os.path.commonpath([os.path.dirname(name_of(stored.url)) for stored in files])
    for number, (stored, (own, groups)) in enumerate(zip(files, found, strict=True)):
        if own != columns:
            raise DataError(
                f"{where}: parquet files of different kinds; got columns {own} in {stored.url}, "
                f"expected {columns} as in {files[0].url}. Name the files of one dataset."
            )
        # A local file whose time alone changed is the same; an object's tag is of its content.
        stamp = stored.stamp if stored.is_remote else ""
        digest.update(
            f"{name_of(stored.url)[len(folder) :]}\0{stamp}\0{groups}\0".encode("utf-8", "replace")
        )
        table += [(number, g, rows, size) for g, (rows, size) in enumerate(groups) if rows]
    arrays = np.array(table, np.int64).reshape(-1, 4).T
    return _Table(*arrays, columns, digest.hexdigest())


def _bytes_of(group: Any, column: str) -> int:
    """The bytes of a column in a row group, not compressed."""
    chunks = map(group.column, range(group.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.split(".")[0] == column
    )


def _refuse_large_cells(stored: Stored, group: Any, column: str) -> None:
    """Raises DataError if a cell must be larger than a file may be; it is not inflated for that."""
    mean = _bytes_of(group, column) // max(1, group.num_rows)
    if mean > MAX_FILE_BYTES:
        raise DataError(
            f"{stored.url}: a cell too large for an image; got {mean} bytes, expected at most "
            f"{MAX_FILE_BYTES}. Leave it out of column {column}."
        )


def _beside(stored: Stored, path: str) -> bytes | bytearray:
    """An image that a local table has by its path alone; empty if there is none."""
    if path and not stored.is_remote:
        try:
            return read_below(os.path.dirname(stored.url), path)
        except DataError:
            pass
    return b""


def _damaged(stored: Stored, error: Exception) -> Exception:
    if isinstance(error, FDError):
        return error
    if isinstance(error, MemoryError):
        return DataError(
            f"{stored.url}: a row group that memory does not hold; got {first_line(error)}, "
            f"expected images of at most {MAX_FILE_BYTES} bytes. Write it with fewer rows in a "
            "group, leave it out, or start fewer loading processes."
        )
    return DataError(
        f"{stored.url}: cannot be read as parquet; got {first_line(error)}, expected a whole file. "
        "Write or fetch it again, or leave it out."
    )

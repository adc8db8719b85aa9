"""Reads images from tables: finds the columns of images and classes, and reads parquet files.

A column of images has the bytes of image files, or structs of bytes and path as Hugging Face's
`datasets` writes them. Images are in the order of the files' names, and within a file in the order
of its rows. A row group of a parquet file is a block, which is fetched whole. This module needs the
package pyarrow.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fd_large.data.blocks import BlockImages, BlockWriter
from fd_large.data.folder import MAX_FILE_BYTES, read_below
from fd_large.data.objects import RANGE_BYTES, STREAMS, Stored, fingerprint_of
from fd_large.errors import DataError, FDError, first_line
from fd_large.files import parse_json
from fd_large.ranks import meeting

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "image_bytes", "bytes")
LABELS = ("label", "labels", "cls", "class", "target", "fine_label")
_ROWS = 64


class Columns(NamedTuple):
    """The columns of a table that have the images and the classes.

    Attributes:
        image: Name of the column of images.
        label: Name of the column of classes, or None if the table has no classes.
        classes: The names of the classes, or None if they are not known.
    """

    image: str
    label: str | None
    classes: tuple[str, ...] | None


def find_columns(schema: pa.Schema, where: str) -> Columns:
    """Finds the columns of images and classes in a table.

    The columns are those that Hugging Face's `datasets` recorded as features in the schema. If
    there are no features, columns are chosen by their types and names (`IMAGES` and `LABELS`).

    Raises: DataError: if no column can be the column of images, or several can.
    """
    features = _features(schema)
    stated = [name for name, kind in features.items() if kind.get("_type") == "Image"]
    able = [field.name for field in schema if _holds_images(field.type)]
    known = [name for name in IMAGES if name in able]
    images = [name for name in stated if name in able] or known[:1] or able
    if len(images) != 1:
        raise DataError(
            f"{where}: {'no column' if not images else 'several columns'} of images; got "
            f"{', '.join(images) or ', '.join(f'{f.name} ({f.type})' for f in schema)}, expected "
            f"one of bytes, or of bytes and path as Hugging Face writes them, called {IMAGES[0]}. "
            "Rename that column."
        )
    label = next((n for n, kind in features.items() if kind.get("_type") == "ClassLabel"), None)
    if label is None:
        able = [f.name for f in schema if pa.types.is_integer(f.type) or _is_text(f.type)]
        label = next((name for name in LABELS if name in able), None)
    names = features.get(label or "", {}).get("names")
    return Columns(images[0], label, tuple(map(str, names)) if names else None)


def cells(column: pa.Array) -> list[tuple[Any, str]]:
    """Returns the contents of each cell in a column of images.

    Args:
        column: An arrow array of binary, or of structs with `bytes` and perhaps `path`.

    Returns: for each cell its bytes as an arrow buffer, or None if the cell has no bytes; and its
        path, or "" if the cell has no path.
    """
    paths: Any = [None] * len(column)
    if pa.types.is_struct(column.type):
        names = [column.type.field(i).name for i in range(column.type.num_fields)]
        parts = dict(zip(names, column.flatten(), strict=True))
        column, paths = parts["bytes"], parts.get("path", pa.nulls(len(column))).to_pylist()
    return [
        (cell.as_buffer() if cell.is_valid else None, path or "")
        for cell, path in zip(column, paths, strict=True)
    ]


def labels_of(
    column: pa.ChunkedArray, columns: Columns, where: str
) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
    """Returns the class of each row, (num_rows,) int64, and the names of the classes.

    The column of classes has whole numbers or names. The names of the classes are None if they are
    not known.

    Raises: DataError: if a row has no class, or its number is negative or past the last class.
    """
    if column.null_count:
        raise DataError(
            f"{where}: images without a label; got {column.null_count} empty cells of column "
            f"{columns.label}, expected a class in each. Drop those rows."
        )
    if _is_text(column.type):
        names = sorted(pc.unique(column).to_pylist())
        indices = pc.index_in(column, pa.array(names, column.type))
        return indices.to_numpy().astype(np.int64), tuple(names)
    labels = column.to_numpy().astype(np.int64)
    highest = len(columns.classes) if columns.classes else np.iinfo(np.int64).max
    if len(labels) and not 0 <= labels.min() <= labels.max() < highest:
        raise DataError(
            f"{where}: an invalid label; got {labels.min()} to {labels.max()} in column "
            f"{columns.label}, expected whole numbers from 0 up"
            + (f" to {highest - 1}" if columns.classes else "")
            + ". Write the dataset again."
        )
    return labels, columns.classes


class ParquetImages(BlockImages):
    """`ImageSource` of the images in some parquet files, read in blocks of a row group.

    Attributes:
        labels: Method that returns the class of each image, and the names of the classes or None;
            absent if the files have no column of classes.
    """

    def __init__(self, root: str, files: Sequence[Stored], *, where: str) -> None:
        """Reads the footers of the files, which describe the row groups and columns.

        Args:
            root: The root that the user gave, for messages.
            files: The files found at this root.
            where: Name of the configuration field that holds the root, for messages.

        Raises: DataError: if a file is damaged or has no column of images, or no file has a row.
        """
        self.root, self._where = root, where
        table, self._columns, fingerprint = meeting.once(
            f"rows of {root}", lambda: _looked_at(files, where)
        )
        if not len(table):
            raise DataError(
                f"{where}: no image in the parquet files; got {root!r} without rows, expected at "
                "least one. Name other files."
            )
        super().__init__(
            files,
            table,
            fingerprint=fingerprint,
            kind=f"{len(table)} row groups of {len(files)} parquet files",
        )
        if self._columns.label is not None:
            self.labels = self._labels

    def _make(self, stored: Stored, part: int, writer: BlockWriter) -> None:
        with stored.open() as file:
            try:
                table = pq.ParquetFile(file, pre_buffer=False, buffer_size=RANGE_BYTES)
                _refuse_large_cells(stored, table.metadata.row_group(part), self._columns.image)
                batches = table.iter_batches(
                    _ROWS, row_groups=[part], columns=[self._columns.image], use_threads=False
                )
                for row, (encoded, path) in enumerate(
                    cell for batch in batches for cell in cells(batch.column(0))
                ):
                    image = _beside(stored, path) if encoded is None else encoded
                    name, size = f"{part}/{row}".encode(), len(image)
                    if size > MAX_FILE_BYTES:  # Reading it raises an error with this size.
                        writer.note(name, 0, size)
                    else:
                        writer.add(name, image)
            except Exception as error:  # Arrow's, on damaged bytes; a store's are FDErrors.
                raise _damaged(stored, error) from error

    def _labels(self) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
        """Returns the class of each image, (len,) int64, and the names of the classes or None."""
        return meeting.once(f"labels of {self.root}", self._read_labels)

    def _read_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
        def column_of(stored: Stored) -> pa.ChunkedArray:
            with stored.open() as file:
                table = pq.ParquetFile(file, pre_buffer=False)
                return table.read([self._columns.label], use_threads=False).column(0)

        with ThreadPoolExecutor(STREAMS) as pool:
            chunks = [chunk for part in pool.map(column_of, self.files) for chunk in part.chunks]
        return labels_of(pa.chunked_array(chunks), self._columns, self._where)


def _looked_at(files: Sequence[Stored], where: str) -> tuple[NDArray[np.int64], Columns, str]:
    """Reads the footers of parquet files.

    Returns: the table of blocks for `BlockImages`, without empty row groups; the columns, which all
        files must have in common; the fingerprint of the dataset.
    Raises: DataError: if a file is damaged or has no column of images, or the columns differ.
    """

    def look(stored: Stored) -> tuple[Any, Any, list[tuple[int, int]]]:
        try:
            with stored.open() as file:
                opened = pq.ParquetFile(file, pre_buffer=False)
                columns = find_columns(opened.schema_arrow, stored.url)
                groups = map(opened.metadata.row_group, range(opened.num_row_groups))
                return columns, [(g.num_rows, _bytes_of(g, columns.image)) for g in groups]
        except Exception as error:  # Arrow's, on damaged bytes; a store's are FDErrors.
            raise _damaged(stored, error) from error

    try:
        with ThreadPoolExecutor(STREAMS) as pool:
            footers = list(pool.map(look, files))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    columns = footers[0][0]
    for stored, (file_columns, _) in zip(files, footers, strict=True):
        if file_columns != columns:
            raise DataError(
                f"{where}: parquet files of different kinds; got columns {file_columns} in "
                f"{stored.url}, expected {columns} as in {files[0].url}. Name the files of one "
                "dataset."
            )
    table = [
        (number, group, rows, size)
        for number, (_, groups) in enumerate(footers)
        for group, (rows, size) in enumerate(groups)
        if rows
    ]
    # The time of a local file is left out, since the same file may be written again; the tag of an
    # object depends on its contents.
    stamps = (stored.stamp if stored.is_remote else "" for stored in files)
    facts = (f"{stamp}\0{groups}" for stamp, (_, groups) in zip(stamps, footers, strict=True))
    return np.array(table, np.int64).reshape(-1, 4), columns, fingerprint_of(files, facts)


def _bytes_of(group: Any, column: str) -> int:
    """Returns the uncompressed size in bytes of a column in a row group (of metadata `group`)."""
    chunks = map(group.column, range(group.num_columns))
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.split(".")[0] == column
    )


def _refuse_large_cells(stored: Stored, group: Any, column: str) -> None:
    """Raises DataError if a column's cells in a row group exceed `MAX_FILE_BYTES` on average.

    The sizes are those in the footer of the file, so that nothing is decompressed.
    """
    mean = _bytes_of(group, column) // max(1, group.num_rows)
    if mean > MAX_FILE_BYTES:
        raise DataError(
            f"{stored.url}: cells of column {column} too large for images; got {mean} bytes on "
            f"average in a row group, expected at most {MAX_FILE_BYTES}. Remove the large cells, "
            "or leave out the file."
        )


def _beside(stored: Stored, path: str) -> bytes | bytearray:
    """Returns the bytes of an image of which a table, the file `stored`, has only the path.

    The path is looked up below the folder of this file. The result is empty if no image is at the
    path, or the file of the table is not local.
    """
    with suppress(DataError):
        if path and not stored.is_remote:
            return read_below(os.path.dirname(stored.url), path)
    return b""


def _damaged(stored: Stored, error: Exception) -> Exception:
    if isinstance(error, FDError):
        return error
    if isinstance(error, MemoryError):
        return DataError(
            f"{stored.url}: a row group that does not fit into memory; got {first_line(error)}, "
            f"expected images of at most {MAX_FILE_BYTES} bytes. Write the file with fewer rows "
            "in a group, leave the file out, or start fewer loading processes."
        )
    return DataError(
        f"{stored.url}: cannot be read as parquet; got {first_line(error)}, expected a whole file. "
        "Write or fetch the file again, or leave it out."
    )


def _features(schema: pa.Schema) -> dict[str, Any]:
    try:
        features = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in features.items() if isinstance(kind, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(f.name == "bytes" and _is_bytes(f.type) for f in kind)
    return _is_bytes(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)

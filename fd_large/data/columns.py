"""Which columns of a table hold images and their classes; what a cell with an image holds."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fd_large.errors import DataError
from fd_large.files import parse_json

IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "image_bytes", "bytes")
LABELS = ("label", "labels", "cls", "class", "target", "fine_label")


class Columns(NamedTuple):
    """The columns of a dataset.

    Attributes:
        image: The column of images.
        label: The column of classes; None: there is none.
        classes: The names of the classes; None: not known.
    """

    image: str
    label: str | None
    classes: tuple[str, ...] | None


def find_columns(schema: pa.Schema, where: str) -> Columns:
    """Finds the columns: those that Hugging Face's features name, else by type and name.

    Raises: DataError: if none holds images, or it is not clear which one does.
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
            "Rename it."
        )
    label = next((n for n, kind in features.items() if kind.get("_type") == "ClassLabel"), None)
    if label is None:
        able = [f.name for f in schema if pa.types.is_integer(f.type) or _is_text(f.type)]
        label = next((name for name in LABELS if name in able), None)
    names = features.get(label or "", {}).get("names")
    return Columns(images[0], label, tuple(map(str, names)) if names else None)


def cells(column: pa.Array) -> list[tuple[Any, str]]:
    """The images of a column: the bytes (None: there are none), and the path ("": none).

    Args:
        column: An array of binary, or of a struct with bytes and path.
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
    """The class of each row, and the names of the classes or None.

    Raises: DataError: if a row has none.
    """
    if column.null_count:
        raise DataError(
            f"{where}: images without a label; got {column.null_count} empty cells of column "
            f"{columns.label}, expected a class in each. Drop those rows."
        )
    if _is_text(column.type):
        names = sorted(pc.unique(column).to_pylist())
        found = pc.index_in(column, pa.array(names, column.type))
        return found.to_numpy().astype(np.int64), tuple(names)
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


def _features(schema: pa.Schema) -> dict[str, Any]:
    try:
        found = parse_json((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: kind for name, kind in found.items() if isinstance(kind, dict)}
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

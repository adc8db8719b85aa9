"""Source of the images in a Hugging Face dataset that `save_to_disk` wrote as arrow files.

The files are memory-mapped, so that any row can be read at any time, and the order of an epoch is a
permutation of all images. The dataset takes no memory except cached pages of the mapped files.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fd_large.data.folder import MAX_FILE_BYTES, read_below
from fd_large.data.tables import cells, find_columns, labels_of
from fd_large.errors import DataError, first_line
from fd_large.files import read_json
from fd_large.ranks import meeting


class SavedDataset:
    """`ImageSource` of the images in a column of a saved dataset.

    Reading the dataset needs the package datasets.

    Attributes:
        fingerprint: A hash of the dataset's own fingerprint, the number of rows, and the name of
            the column.
        kind: Description of the dataset.
        labels: Method that returns the class of each image, and the names of the classes or None;
            absent if no column has classes.
    """

    kind = "a saved Hugging Face dataset"

    def __init__(self, root: str, *, where: str) -> None:
        """Opens the dataset.

        Args:
            root: The folder that `save_to_disk` wrote.
            where: Name of the configuration field that holds the root, for messages.

        Raises: DataError: if the dataset is damaged or empty, or has no column of images.
        """
        self.root, self._where = root, where
        self._opened: tuple[int, Any] | None = None
        try:
            dataset = self._load()
        except Exception as error:  # The library's, on damaged files.
            raise DataError(
                f"{where}: a saved dataset cannot be opened; got {first_line(error)} for {root!r}, "
                "expected a folder that save_to_disk of the datasets library wrote. Save it again."
            ) from error
        if not len(dataset):
            raise DataError(
                f"{where}: no image in the dataset; got {root!r} without rows, expected at least "
                "one row. Name another dataset."
            )
        self._columns = find_columns(dataset.features.arrow_schema, where)
        self._len = len(dataset)
        identity = f"{dataset._fingerprint} {len(dataset)} {self._columns.image}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        if self._columns.label is not None:
            self.labels = self._labels

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> str:
        if not 0 <= index < self._len:
            raise IndexError(f"image {index} of {self._len}")
        return f"{self.root}/{index}"

    def read(self, index: int) -> bytes | bytearray:
        """Returns the bytes of image `index`.

        If the column has only the path of the image, the file at this path is read. The result is
        empty if the column has neither bytes nor a path for the image.

        Raises: DataError: if the image cannot be read.
        """
        try:
            column = self._images()[index].column(0).combine_chunks()
            ((encoded, path),) = cells(column)
            if encoded is not None and encoded.size > MAX_FILE_BYTES:
                raise ValueError(f"a cell of {encoded.size} bytes")
            image = None if encoded is None else encoded.to_pybytes()
        except Exception as error:  # The library's, on damaged files.
            raise DataError(
                f"{self[index]}: cannot be read; got {first_line(error)}, expected an image. Save "
                "the dataset again."
            ) from error
        if image is None and path:
            return read_below(self.root, path)
        return image or b""

    def _labels(self) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
        return meeting.once(f"labels of {self.root}", self._read_labels)

    def _read_labels(self) -> tuple[NDArray[np.int64], tuple[str, ...] | None]:
        table = self._load().select_columns([self._columns.label]).with_format("arrow")[:]
        return labels_of(table.column(0), self._columns, self._where)

    def _load(self) -> Any:
        import datasets

        state = read_json(
            Path(self.root) / "state.json", where=self._where, holds=dict, of=DataError
        )
        for file in state["_data_files"]:
            if os.path.basename(file["filename"]) != file["filename"]:
                raise ValueError(f"{file['filename'][:100]!r} as the name of one of its files")
        return datasets.load_from_disk(self.root)

    def _images(self) -> Any:
        # Each process maps the files itself.
        if self._opened is None or self._opened[0] != os.getpid():
            images = self._load().select_columns([self._columns.image]).with_format("arrow")
            self._opened = os.getpid(), images
        return self._opened[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

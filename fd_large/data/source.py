"""Sources of a run's images: the interface of a source, and the table of the package's sources.

To add a source to the package, write a class with the interface `ImageSource` and a function that
opens it, and add this function to `SOURCES`. `custom.py` opens sources outside of the package.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Protocol

from fd_large.data.balanced import open_balanced
from fd_large.data.custom import open_custom
from fd_large.data.folder import open_folder
from fd_large.data.objects import Stored, find, find_objects, join
from fd_large.data.photographs import open_photographs
from fd_large.data.remote_shards import RemoteShards
from fd_large.data.roots import (
    PARQUET,
    SAVED_PARTS,
    is_saved,
    is_url,
    listed,
    local_kind,
    name_of,
    require,
)
from fd_large.data.shards import open_shards
from fd_large.errors import DataError
from fd_large.ranks import meeting

log = logging.getLogger(__name__)


class ImageSource(Protocol):
    """A dataset of images, numbered from 0 in the same order on every machine and in every process.

    A source is opened on every rank, pickled, and read by index in the loading processes. A source
    may have further methods that take an index, for other parts of a sample, such as the objects in
    an image. A source with classes also has

        labels() -> tuple[NDArray[np.int64], tuple[str, ...] | None]

    which returns the class of each image, (num_images,), and the names of the classes in their
    order, or None if the classes have no names. `labelled.py` maps the names to the training set's
    classes.

    A source whose images are read in blocks has `blocks`, a `sampler.Blocks` that determines the
    order of an epoch, and `expect(numbers)`, which starts to fetch the blocks with these numbers.

    Attributes:
        fingerprint: A hash of the samples' names in order. Fingerprints are compared between nodes,
            and, when a run resumes, with the fingerprint in the checkpoint.
    """

    fingerprint: str

    def __len__(self) -> int:
        """Returns the number of images, at least one."""

    def __getitem__(self, index: int) -> str:
        """Returns the path, URL or name of image `index`, for messages.

        Raises: IndexError: if there is no image with this index.
        """

    def read(self, index: int) -> bytes | bytearray:
        """Returns the bytes of image `index`, in any format that `decode.py` reads.

        Raises: DataError: if the image cannot be read; the loader then counts and replaces it.
        """


def _open_objects(root: str, *, where: str) -> ImageSource | None:
    """Opens the tar shards or parquet files at a URL, or returns None if `root` is not a URL.

    Args:
        root: URL of a file or a folder, or a pattern of URLs.
        where: Name of the configuration field that holds the URL, for messages.

    Raises: DataError: if there are no such files, the store refuses a request, or a package is
        missing.
    """
    if not is_url(root):
        return None
    if not (objects := find_objects(root, where)):
        raise DataError(
            f"{where}: neither tar shards nor parquet files; got {root!r}, expected objects "
            "ending in .tar or .parquet at that URL or below it. Correct the URL; pack single "
            "images into shards, or copy them to a folder."
        )
    is_table = name_of(objects[0].url).lower().endswith(PARQUET)
    return (_open_tables if is_table else RemoteShards)(root, objects, where=where)


def _open_parquet(root: str, *, where: str) -> ImageSource | None:
    """Opens local parquet files, or returns None if `root` names no parquet files.

    The root may be a parquet file, a pattern of parquet files, or a folder with parquet files in it
    or in its subfolder `data`.

    Raises: DataError: if a file is missing or damaged, or a package is missing.
    """

    def holds_parquet() -> bool:
        folders = [f for f in (root, join(root, "data")) if local_kind(f, where=where) == "folder"]
        names = (name for folder in folders for name in listed(folder, where))
        return any(name.lower().endswith(PARQUET) for name in names)

    if not root.lower().endswith(PARQUET):
        is_folder = local_kind(root, where=where) == "folder"
        if not (is_folder and meeting.once(f"parquet in {root}", holds_parquet)):
            return None
    files = meeting.once(f"parquet files of {root}", lambda: find(root, (PARQUET,), where))
    if not files:
        raise DataError(
            f"{where}: no such parquet file; got {root!r}, expected at least one. Correct the name."
        )
    return _open_tables(root, files, where=where)


def _open_tables(root: str, files: Sequence[Stored], *, where: str) -> ImageSource:
    require("pyarrow", "parquet files", where)
    from fd_large.data.tables import ParquetImages

    return ParquetImages(root, files, where=where)


def _open_saved_dataset(root: str, *, where: str) -> ImageSource | None:
    """Opens a folder that `save_to_disk` of Hugging Face's `datasets` wrote.

    The result is None if `root` is no such folder.

    Raises: DataError: if the folder has several parts of a dataset, or the package is missing.
    """
    if local_kind(root, SAVED_PARTS, where=where) == "file":
        parts = sorted(e.name for e in os.scandir(root) if e.is_dir())
        raise DataError(
            f"{where}: a dataset of several parts; got {root!r} with {', '.join(parts)}, expected "
            f"a single part. Set --{where} {os.path.join(root, parts[0] if parts else 'PART')}."
        )
    if not is_saved(root, where):
        return None
    require("datasets", "a saved dataset", where)
    from fd_large.data.saved_dataset import SavedDataset

    return SavedDataset(root, where=where)


# Each takes the value of `data.root`, and `where`, the name of this field for messages. It returns
# None for a source of another kind, and raises DataError for one of its kind that cannot be used.
SOURCES: tuple[Callable[..., ImageSource | None], ...] = (
    open_custom,
    open_photographs,
    _open_saved_dataset,
    _open_objects,
    _open_parquet,
    open_shards,
    open_folder,
)


def open_images(root: str, *, where: str = "data.root") -> ImageSource:
    """Opens the dataset that the configuration field `data.root` or another field names.

    Args:
        root: A folder of images, in which subfolders are included; a folder with tar files and no
            image files; a tar file; a pattern of tar files, such as "train-{0000..0146}.tar" or
            "train-*.tar"; a file, a pattern or a folder of parquet files; the URL of tar or parquet
            files, or of their folder, such as "s3://bucket/data/"; a dataset saved by Hugging
            Face's `datasets`; a built-in dataset, "builtin:photographs"; the user's own source,
            "module:PATH/TO/FILE.py:NAME"; or a weighted sum of these (roots.py).
        where: Name of the configuration field that holds the root, for messages.

    Raises:
        DataError: if the root is none of these, or the dataset has no image.
        ConfigError: if the user's own code cannot be imported.
    """
    balanced = open_balanced(root, where, lambda part, name: open_images(part, where=name))
    if balanced is not None:
        return balanced
    for open_source in SOURCES:
        if (source := open_source(root, where=where)) is not None:
            if kind := getattr(source, "kind", ""):
                log.info("%s: %s images in %s: %s", where, f"{len(source):,}", kind, root)
            return source
    is_file = local_kind(root, where=where) == "file"
    raise DataError(
        f"{where}: {'neither a folder nor a tar file' if is_file else 'no such folder'}; got "
        f"{root!r}, expected a folder of images, tar shards or parquet files, "
        f"FILE.tar, FILE.parquet, or a URL of such files. Set --{where} FOLDER."
    )

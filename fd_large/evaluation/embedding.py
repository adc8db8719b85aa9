"""Writes the features of all images of a dataset to a table, in the order of the images' names.

All ranks extract the features chunk by chunk into FILE.parts/. A chunk gets its final name when it
is complete, so that the command, started again after it was killed, continues after the last
complete chunk, on any number of ranks. At the end the chunks are joined to the table.
"""

from __future__ import annotations

import csv
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fd_large.backbones.statistics import normalise
from fd_large.data.labelled import LabelledImages
from fd_large.data.source import ImageSource
from fd_large.data.val_fraction import Part
from fd_large.engine.find_model import NamedModel
from fd_large.engine.zero.fingerprint import fingerprint
from fd_large.errors import ConfigError, DataError
from fd_large.evaluation.frozen import Subject, subjects
from fd_large.files import kind_of, read_json, replacing, write_json
from fd_large.probes.features import MAX_BAD_FRACTION, NO_LABEL, Pool, extract
from fd_large.ranks import activity, distributed

log = logging.getLogger(__name__)

CHUNK = 4096
"""Number of images in a chunk, which is rounded up to a multiple of the batch size."""
_SETTINGS, _ROWS, _LABELS = "settings.json", "rows.npy", "labels.npy"


class Chunk(NamedTuple):
    """Features of consecutive images, without those that could not be decoded.

    Attributes:
        names: Names of the N images.
        rows: Features (N, C), or maps (N, H, W, C), in float32.
    """

    names: list[str]
    rows: NDArray[np.float32]


Chunks = Callable[[], Iterator[Chunk]]


def embed(
    model: NamedModel,
    images: ImageSource,
    out: Path,
    *,
    root: str,
    feature: str,
    pool: Pool,
    batch_size: int,
    workers: int,
    max_pixels: int,
) -> int:
    """Writes a table of features.

    Every rank has to call this function.

    Args:
        model: The model.
        images: The images.
        out: The file to write, which must not exist yet; its ending is one of `WRITERS`.
        root: The dataset's root, to which the names in the table are relative.
        feature: "map" for the model's own map, or the name of a head, as in `evaluate --features`.
        pool: "mean" for the mean of an image's patch tokens, "cls" for its class token, or "map".
        batch_size: Images per forward; the last bits of the result depend on it.
        workers: Number of loader processes of each rank.
        max_pixels: Largest number of pixels of an image; larger images are not decoded.

    Returns: the number of rows of the table.

    Raises:
        FDError: If the feature does not exist, if more than one in a hundred images cannot be
            decoded, or if FILE.parts/ holds chunks that were extracted with other settings.
    """
    (subject,) = subjects([model], [feature])
    folder = out.with_name(f"{out.name}.parts")
    settings = {
        "images": images.fingerprint,
        "model": fingerprint(nn.ModuleList(subject.modules)),
        "image_size": model.image_size,
        "features": feature,
        "pool": pool,
        "batch_size": batch_size,
        "max_pixels": max_pixels,
    }
    distributed.together(partial(_begin, folder, settings))
    size = batch_size * -(-CHUNK // batch_size)
    chunks = {folder / f"{start:012d}": start for start in range(0, len(images), size)}
    # Two starts at the same time write to different folders.
    start_id = distributed.broadcast_object(uuid.uuid4().hex)
    own_images = -(-len(images) // distributed.world_size())
    description = f"{model.label}: features at {model.image_size} px"
    with activity.work(description, own_images, "images") as work:
        for chunk, start in chunks.items():
            if distributed.broadcast_object(_is_there(chunk)):
                continue
            places = np.arange(start, min(start + size, len(images)))
            aside = folder / f"{chunk.name}.{start_id}"
            extract(
                subject.forward,
                subject.statistics,
                LabelledImages(Part(images, places), np.zeros(len(places), np.int64), ("",)),
                aside,
                image_size=model.image_size,
                batch_size=batch_size,
                pools=[pool],
                workers=workers,
                max_pixels=max_pixels,
                max_bad_fraction=1.0,
                progress=work.advance,
            )
            distributed.barrier()  # Every rank has mapped the files under their temporary names.
            distributed.together(partial(_appear, aside, chunk))
    shape = _shape(subject, model.image_size) if pool == "map" else (-1,)

    def read() -> Iterator[Chunk]:
        for chunk, start in chunks.items():
            rows, labels = (np.load(chunk / name, mmap_mode="r") for name in (_ROWS, _LABELS))
            usable = np.flatnonzero(labels != NO_LABEL)
            names = [_name(images[start + place], root) for place in usable.tolist()]
            yield Chunk(names, rows[usable].reshape(len(usable), *shape))

    def join() -> int:
        if not distributed.is_main():
            return 0
        usable = sum(
            int((np.load(chunk / _LABELS, mmap_mode="r") != NO_LABEL).sum()) for chunk in chunks
        )
        if len(images) - usable > MAX_BAD_FRACTION * len(images):
            raise DataError(
                f"data.root: too many images cannot be used; got {len(images) - usable} of "
                f"{len(images)}, expected at most one in a hundred. Replace the files that the "
                f"warnings name, and remove {folder}."
            )
        with replacing(out) as path:
            WRITERS[out.suffix](path, read)
        shutil.rmtree(folder, ignore_errors=True)
        return usable

    with activity.work(f"writing {out.name}"):
        return distributed.broadcast_object(distributed.together(join))


def _begin(folder: Path, settings: dict[str, object]) -> None:
    """Creates the folder of the chunks on rank 0, and refuses chunks of other settings in it.

    Args:
        folder: The folder, FILE.parts/.
        settings: Everything on which the features depend, by name.

    Raises: ConfigError: if the folder has chunks that were extracted with other settings.
    """
    if not distributed.is_main():
        return
    path = folder / _SETTINGS
    folder.mkdir(parents=True, exist_ok=True)
    done = sum(1 for file in folder.iterdir() if not file.suffix)
    if not done:  # Settings of a start that ended before its first chunk do not bind.
        write_json(path, settings)
    before = read_json(path, where="--out", holds=dict, remedy=f"Remove {folder}.")
    differing = [name for name in settings if before.get(name) != settings[name]]
    if differing:
        raise ConfigError(
            f"--out: {folder} holds features of other settings; got other values of "
            f"{', '.join(differing)}, expected the same values. Remove the folder to start over, "
            "or name another --out."
        )
    if done:
        log.info("--out: continuing after %d parts that an earlier start wrote", done)


def _is_there(folder: Path) -> bool:
    return kind_of(folder, where="--out") == "folder"


def _appear(aside: Path, chunk: Path) -> None:
    """Flushes a chunk's files to the disk and gives the chunk its final name, on rank 0.

    If the chunk exists already, the temporary folder is removed.

    Args:
        aside: The temporary folder, with the files of the chunk.
        chunk: The final name of this folder.
    """
    if not distributed.is_main():
        return
    for name in (_ROWS, _LABELS):
        with (aside / name).open("rb") as file:
            os.fsync(file.fileno())
    if _is_there(chunk):
        shutil.rmtree(aside)
    else:
        aside.rename(chunk)


def _shape(subject: Subject, side: int) -> tuple[int, ...]:
    """Returns (rows, columns, -1), the shape to which the flat features of an image are reshaped.

    Args:
        subject: The model, of whose map the rows and columns are returned.
        side: Side of the images in pixels.
    """
    blank = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=distributed.device())
    with torch.no_grad():
        return (*subject.forward(normalise(blank, subject.statistics)).grid, -1)


def _name(name: str, root: str) -> str:
    return os.path.relpath(name, root) if name.startswith(f"{root.rstrip('/')}/") else name


# --- tables ---


def _write_csv(path: Path, chunks: Chunks) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        writer, is_first = csv.writer(file), True
        for chunk in chunks():
            if is_first:
                writer.writerow(["name", *(f"f{number}" for number in range(chunk.rows.shape[1]))])
                is_first = False
            # The shortest digits that are read as the same float32.
            writer.writerows(
                [name, *map(str, row)] for name, row in zip(chunk.names, chunk.rows, strict=True)
            )


def _write_npz(path: Path, chunks: Chunks) -> None:
    first, names = next(chunks()), [name for chunk in chunks() for name in chunk.names]
    whole = path.with_name(f"{path.name}.npy")
    try:
        shape = (len(names), *first.rows.shape[1:])
        array, done = np.lib.format.open_memmap(whole, "w+", np.float32, shape), 0
        for chunk in chunks():
            array[done : done + len(chunk.rows)] = chunk.rows
            done += len(chunk.rows)
        with path.open("wb") as file:
            np.savez(file, names=np.array(names), features=array)
    finally:
        whole.unlink(missing_ok=True)


def _write_parquet(path: Path, chunks: Chunks) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    writer = None
    try:
        for chunk in chunks():
            values = pa.array(chunk.rows.reshape(-1))
            lists = pa.FixedSizeListArray.from_arrays(values, chunk.rows.shape[1])
            # Texts in Parquet are UTF-8; the name of a file may be other bytes.
            names = [os.fsencode(name).decode(errors="backslashreplace") for name in chunk.names]
            table = pa.table({"name": names, "features": lists})
            writer = writer or parquet.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer:
            writer.close()


WRITERS: dict[str, Callable[[Path, Chunks], None]] = {
    ".csv": _write_csv,
    ".npz": _write_npz,
    ".parquet": _write_parquet,
}
"""Functions that write the chunks to a table, by the suffix of the table's file."""

"""Pooled features of labelled images, streamed to a file by all ranks.

Each image has one row of float32 features: the mean of its patch tokens, its class token, the two
concatenated, or all its patch tokens concatenated. Images are grouped into the same batches on any
number of ranks, so that rows are equal to the bit. All ranks write to one file in a shared folder,
so that memory does not grow with the dataset.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import Statistics, normalise
from fd_large.data.centre_crops import NO_LABEL, central_batches
from fd_large.data.labelled import LabelledImages
from fd_large.errors import ConfigError, DataError
from fd_large.ranks import distributed

log = logging.getLogger(__name__)

Pool = Literal["mean", "cls", "both", "map"]
# The parts of a row that has more than one feature.
_PARTS: dict[Pool, tuple[Pool, ...]] = {"both": ("mean", "cls")}
# Largest fraction of unusable images with which a figure still describes the dataset.
MAX_BAD_FRACTION = 0.01


class Features(NamedTuple):
    """Features and labels of N images for one way of pooling, as memory-mapped arrays.

    Attributes:
        rows: (N, C) float32, the features.
        labels: (N,) int64, the labels; `NO_LABEL` for an image that could not be used.
    """

    rows: NDArray[np.float32]
    labels: NDArray[np.int64]

    def usable(self) -> NDArray[np.int64]:
        """Returns the indices of the images that have a label, (M,) int64."""
        return np.flatnonzero(self.labels != NO_LABEL)

    def percent(self, predicted: NDArray[np.int64]) -> float:
        """Returns the accuracy over the images with a label, in per cent; 0 if there are none.

        Args:
            predicted: (N,), the predicted class of each image; not read for images without a label.
        """
        usable = self.usable()
        right = int((predicted[usable] == self.labels[usable]).sum())
        return 100 * right / max(1, len(usable))


def pooled(features: FeatureMap, pool: Pool) -> Tensor:
    """Pools `features`, the feature maps of B images, into one row of float32 features per image.

    The map has N patch tokens of C channels. For `pool` "mean" the result is the mean of the patch
    tokens, (B, C); for "cls" the class token, (B, C); for "both" the mean and the class token,
    (B, 2C); for "map" all patch tokens concatenated, (B, N C).

    Raises: ConfigError: if `pool` needs a class token and the map has none.
    """
    if pool in _PARTS:
        return torch.cat([pooled(features, part) for part in _PARTS[pool]], 1)
    if pool == "cls":
        if features.num_prefix_tokens:
            return features.tokens[:, 0].float()
        if features.summary is None:
            raise ConfigError(
                "--pool: the model's map has no class token; got cls, expected mean. Set --pool "
                "mean."
            )
        return features.summary[:, 0].float()
    patches = features.tokens[:, features.num_prefix_tokens :].float()
    return patches.flatten(1) if pool == "map" else patches.mean(1)


def extract(
    model: Callable[[Tensor], FeatureMap],
    statistics: Statistics,
    images: LabelledImages,
    folder: Path,
    *,
    image_size: int,
    batch_size: int,
    pools: Sequence[Pool] = ("mean",),
    workers: int = 0,
    max_pixels: int = 2**26,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    progress: Callable[[int], None] = lambda count: None,
    between: Callable[[], None] = lambda: None,
) -> list[Features]:
    """Extracts the features of the centre crops of all images into files; a collective.

    Args:
        model: Function from normalised images to a FeatureMap, in evaluation mode; may be a
            collective.
        statistics: Mean and standard deviation by which the images are normalised.
        images: The images and their labels.
        folder: Shared folder of all ranks, for rows.npy and labels.npy.
        image_size: Side of the crops, in pixels.
        batch_size: Images per forward; the last bits of the result depend on it.
        pools: Kinds of pooling: "mean", "cls", "both" or "map" (`pooled`). All are computed from
            the same forwards.
        workers: Loader processes of each rank.
        max_pixels: Number of pixels above which an image counts as unusable, without being decoded.
        max_bad_fraction: Largest fraction of the images that may be unusable.
        progress: Called after each batch of this rank with the batch's number of images.
        between: Called before each batch on every rank; may raise to stop.

    Returns: the features for each kind of pooling, in the order of `pools`.
    Raises:
        DataError: if the fraction of images that cannot be used exceeds `max_bad_fraction`.
        ConfigError: if the disk of the folder is full, or the map has no class token and a pooling
            needs it.
    """
    rank, world = distributed.rank(), distributed.world_size()
    device = distributed.device()
    # A part that several kinds of pooling need is stored once.
    stored = list(dict.fromkeys(part for pool in pools for part in _PARTS.get(pool, (pool,))))

    def forward(pixels: Tensor) -> Tensor:
        features = model(normalise(pixels.to(device), statistics))
        return torch.cat([pooled(features, part) for part in stored], 1)

    nothing = torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8)
    with torch.no_grad():
        width = forward(nothing).shape[1]
    paths = folder / "rows.npy", folder / "labels.npy"
    # Also a barrier, so that no rank maps the files before they exist.
    distributed.together(lambda: _reserve(paths, len(images), width))
    rows, labels = (np.load(path, mmap_mode="r+") for path in paths)
    bad = 0
    mine = central_batches(
        images,
        image_size=image_size,
        batch_size=batch_size,
        rank=rank,
        world_size=world,
        workers=workers,
        max_pixels=max_pixels,
    )
    # Every rank makes the same number of forwards, which a sharded model makes as collectives.
    for _ in range(-(-len(images) // (batch_size * world))):
        between()
        batch = next(mine, None)
        with torch.no_grad():
            new_rows = forward(nothing if batch is None else batch.images).cpu().numpy()
        if batch is None:
            continue
        where = slice(batch.start, batch.start + len(new_rows))
        rows[where], labels[where] = new_rows, batch.labels.numpy()
        bad += len(batch.bad)
        for message in batch.bad:
            log.warning("left out: %s", message)
        progress(len(new_rows))
    rows.flush()
    labels.flush()
    bad = int(distributed.sum_tensor(torch.tensor(bad)))
    distributed.barrier()
    if bad > max_bad_fraction * len(images):
        raise DataError(
            f"data.root: too many images cannot be used; got {bad} of {len(images)}, expected "
            "at most one in a hundred. Replace the files that the warnings name."
        )
    rows, labels = (np.load(path, mmap_mode="r") for path in paths)
    parts = dict(zip(stored, np.split(rows, len(stored), axis=1), strict=True))
    return [Features(parts.get(pool, rows), labels) for pool in pools]


def _reserve(paths: tuple[Path, Path], num_images: int, width: int) -> None:
    """Creates the files of the features and labels on rank 0, and reserves their disk space.

    On other ranks this function does nothing. Without the reservation, a process that writes to a
    memory-mapped file would be killed when the disk becomes full.

    Args:
        paths: Paths of the file of features and of the file of labels.
        num_images: Number of images, which is the number of rows of each file.
        width: Number of features of an image.

    Raises: ConfigError: if the disk has too little space.
    """
    if not distributed.is_main():
        return
    shapes = ((num_images, width), np.float32), ((num_images,), np.int64)
    try:
        for path, (shape, dtype) in zip(paths, shapes, strict=True):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.lib.format.open_memmap(path, "w+", dtype, shape).flush()
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        size = num_images * (4 * width + 8)
        raise ConfigError(
            f"{paths[0].parent}: no room for the features of {num_images:,} images; got "
            f"{error}, expected {size / 1e9:.3g} GB of free space. Free this space, or choose "
            "another folder."
        ) from error

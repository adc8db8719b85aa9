"""Extracts features into temporary files that all ranks read, for all protocols."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from fd_large.backbones.feature_map import FeatureMap
    from fd_large.backbones.statistics import Statistics
    from fd_large.data.labelled import LabelledImages
    from fd_large.evaluation.protocol import Request
    from fd_large.probes.features import Features, Pool
    from fd_large.recipes.sections import Data


def join_ranks(request: Request) -> Data:
    """Starts the process group of `evaluate`, and makes float32 computations exact (no TF32).

    Returns: the section `data` of the request's recipe.
    """
    from fd_large.kernels.precision import full_float32
    from fd_large.ranks import distributed
    from fd_large.runtime import logs

    assert request.run is not None  # The command `evaluate` has a recipe.
    logs.start(distributed.start().rank)
    full_float32(distributed.device())
    return request.run.data


@contextmanager
def working(description: str, images: int) -> Iterator[Callable[[float], None]]:
    """Shows a progress bar during the block.

    Yields: a function of the number of images that this rank has finished since the last call.

    Args:
        description: Description of the work.
        images: Number of images of all ranks, of which each rank has an equal share.
    """
    from fd_large.ranks import activity, distributed

    with activity.work(description, -(-images // distributed.world_size()), "images") as work:
        yield work.advance


@contextmanager
def extracted(
    forward: Callable[[Tensor], FeatureMap],
    statistics: Statistics,
    images: LabelledImages,
    folder: Path,
    *,
    image_size: int,
    words: str,
    flags: Any,
    data: Data,
    pools: Sequence[Pool] = ("mean",),
) -> Iterator[list[Features]]:
    """Yields the features of images for each kind of pooling.

    Every rank has to call this function. The arrays are mapped from files that are removed after
    the block, so that the caller must copy what is needed later.

    Args:
        forward: Function from normalised images to a FeatureMap, in evaluation mode.
        statistics: Mean and standard deviation by which the images are normalised.
        images: The images and their labels.
        folder: Folder of the files, which rank 0 removes after the block.
        image_size: Side of the centre crops in pixels.
        words: Description of the work, for the progress bar.
        flags: The command's own flags, with `batch_size`.
        data: The section `data` of the recipe.
        pools: Kinds of pooling, in the order of the result: "mean", "cls", "both" or "map".
    """
    from fd_large.probes.features import extract
    from fd_large.ranks import distributed

    with working(words, len(images)) as progress:
        features = extract(
            forward,
            statistics,
            images,
            folder,
            image_size=image_size,
            batch_size=flags.batch_size,
            pools=pools,
            workers=data.workers,
            max_pixels=data.max_pixels,
            progress=progress,
        )
    yield features
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)

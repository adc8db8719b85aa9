"""Features of a model's images, in temporary files that all ranks read; shared by the protocols."""

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
    """Joins the ranks of a command and lets them compute in full float32; returns its images."""
    from fd_large.kernels.precision import full_float32
    from fd_large.ranks import distributed
    from fd_large.runtime import logs

    assert request.run is not None  # `evaluate` takes one.
    logs.start(distributed.start().rank)
    full_float32(distributed.device())
    return request.run.data


@contextmanager
def working(description: str, images: int) -> Iterator[Callable[[float], None]]:
    """Yields a function that reports this rank's finished images, as a measure of all ranks'."""
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
    """Yields the features of images, for each pool; a collective.

    The files are removed after the block: copy what is kept.

    Args:
        forward, statistics, images, image_size, pools: See `probes.features.extract`.
        folder: Folder of the files; rank 0 removes it.
        words: Description of the work, for the progress bar.
        flags: The command's own flags, with `batch_size`.
        data: The recipe's section of images.
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

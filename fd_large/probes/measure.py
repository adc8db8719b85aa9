"""One frozen model measured on labelled images: features of both splits, then k-NN or a probe."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import Statistics
from fd_large.data.labelled import LabelledImages
from fd_large.probes import knn, linear
from fd_large.probes.features import Pool, extract
from fd_large.ranks import activity, distributed

Method = Literal["knn", "linear"]


class Accuracy(NamedTuple):
    """What came out of one feature of the images.

    Attributes:
        pool: The feature.
        predicted: For each seed the class that each test image is given, (N,).
        labels: (N,), the class of each test image; `NO_LABEL` where it could not be used.
        values: For each seed the percentage of the test images that were classified correctly.
        details: More about each seed.
    """

    pool: Pool
    predicted: list[NDArray[np.int64]]
    labels: NDArray[np.int64]
    values: list[float]
    details: list[dict[str, Any]]


def measure(
    model: Callable[[Tensor], FeatureMap],
    statistics: Statistics,
    train: LabelledImages,
    test: LabelledImages,
    folder: Path,
    *,
    method: Method,
    seeds: Sequence[int],
    label: str,
    image_size: int,
    batch_size: int,
    pools: Sequence[Pool],
    workers: int,
    max_pixels: int,
    k: int,
    temperature: float,
    rates: tuple[float, ...],
    epochs: int,
) -> list[Accuracy]:
    """Measures a model by its features; a collective.

    Args:
        model: Normalised images -> FeatureMap, in evaluation.
        statistics: Normalisation of its images.
        train: Images whose features vote or train the probe.
        test: Images that are classified.
        folder: Folder of the features, 4 bytes for each channel and image; removed at the end. All
            ranks see it.
        method: The test. k-NN has no randomness and is made once.
        seeds: Seeds of the probe.
        label: What the model is called.
        image_size, batch_size, pools, workers, max_pixels: See `extract`.
        k, temperature: See `knn.classify`.
        rates, epochs: See `linear.Probe`.

    Returns: what came out of each pool.
    Raises: As `extract` and `linear.evaluate`.
    """
    features = []
    for name, images in (("training", train), ("test", test)):
        with _work(f"{label}: {name} features", len(images)) as progress:
            features.append(
                extract(
                    model,
                    statistics,
                    images,
                    folder / name,
                    image_size=image_size,
                    batch_size=batch_size,
                    pools=pools,
                    workers=workers,
                    max_pixels=max_pixels,
                    progress=progress,
                )
            )
    num_classes, results = len(train.classes), []
    for pool, voting, tested in zip(pools, *features, strict=True):
        # Copied: the files of features are removed.
        result = Accuracy(pool, [], np.array(tested.labels), [], [])
        if method == "knn":
            with _work(f"{label}: k-NN of {pool}", len(test)) as progress:
                predicted = knn.classify(
                    voting,
                    tested,
                    num_classes=num_classes,
                    k=k,
                    temperature=temperature,
                    progress=progress,
                )
            result.predicted.append(predicted)
            result.details.append({})
        else:
            for seed in seeds:
                probe = linear.Probe(rates=rates, epochs=epochs, seed=seed)
                # Every rank does all of it.
                num_images = linear.work(len(train), probe) * distributed.world_size()
                with _work(f"{label}: probe, seed {seed}", num_images) as progress:
                    outcome = linear.evaluate(
                        voting, tested, num_classes=num_classes, probe=probe, progress=progress
                    )
                result.predicted.append(outcome.predicted)
                result.details.append({"rate": outcome.rate, "held_out": list(outcome.held_out)})
        result.values.extend(tested.percent(predicted) for predicted in result.predicted)
        results.append(result)
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    return results


@contextmanager
def _work(what: str, images: int) -> Iterator[Callable[[float], None]]:
    """Yields what this rank's finished images are reported to; they stand for all ranks'."""
    with activity.work(what, -(-images // distributed.world_size()), "images") as work:
        yield work.advance

"""One frozen model measured on labelled images: features of both splits, then k-NN or a probe."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from fd_large import activity, distributed
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import Statistics
from fd_large.data.labelled import LabelledImages
from fd_large.probes import knn, linear
from fd_large.probes.features import Pool, extract

Method = Literal["knn", "linear"]


class Accuracy(NamedTuple):
    """What came out.

    Attributes:
        values: Percentage of the test images that were classified correctly, one for each seed.
        details: More about each seed.
    """

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
    pool: Pool,
    workers: int,
    max_pixels: int,
    k: int,
    temperature: float,
    rates: tuple[float, ...],
    epochs: int,
) -> Accuracy:
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
        image_size, batch_size, pool, workers, max_pixels: See `extract`.
        k, temperature: See `knn.accuracy`.
        rates, epochs: See `linear.Probe`.

    Raises: As `extract`, `knn.accuracy` and `linear.evaluate`.
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
                    pool=pool,
                    workers=workers,
                    max_pixels=max_pixels,
                    progress=progress,
                )
            )
    result, num_classes = Accuracy([], []), len(train.classes)
    if method == "knn":
        with _work(f"{label}: k-NN", len(test)) as progress:
            value = knn.accuracy(
                *features,
                num_classes=num_classes,
                k=k,
                temperature=temperature,
                progress=progress,
            )
        result.values.append(value)
        result.details.append({})
    else:
        for seed in seeds:
            probe = linear.Probe(rates=rates, epochs=epochs, seed=seed)
            # Every rank does all of it.
            num_images = linear.work(len(train), probe) * distributed.world_size()
            with _work(f"{label}: probe, seed {seed}", num_images) as progress:
                outcome = linear.evaluate(
                    *features, num_classes=num_classes, probe=probe, progress=progress
                )
            result.values.append(outcome.test)
            result.details.append({"rate": outcome.rate, "held_out": list(outcome.held_out)})
    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)
    return result


@contextmanager
def _work(what: str, images: int) -> Iterator[Callable[[float], None]]:
    """Yields what this rank's finished images are reported to; they stand for all ranks'."""
    with activity.work(what, -(-images // distributed.world_size()), "images") as work:
        yield work.advance

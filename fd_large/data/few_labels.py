"""Chooses a part of the labelled training images: a fraction or a number of each class's images.

The choice depends on a seed and on the names of the images below their folder or in their tar
files, so that all models of a comparison learn from the same images, on any machine. The images
chosen for a smaller number are also among the images chosen for a larger number. In sources that
are neither folders nor local tar files, an image is chosen by its index instead of its name.
"""

from __future__ import annotations

import hashlib
import logging
import os

import numpy as np

from fd_large.data.folder import ImageFolder
from fd_large.data.labelled import LabelledImages
from fd_large.data.shards import TarShards
from fd_large.data.val_fraction import Part

log = logging.getLogger(__name__)


def few_labels(
    images: LabelledImages, *, fraction: float, per_class: int, seed: int
) -> LabelledImages:
    """Chooses images of each class, at least one, and returns the dataset of the chosen images.

    With a `fraction` of 1 and a `per_class` of 0, all images are returned.

    Args:
        images: The training images.
        fraction: Fraction of each class's images to choose, in (0, 1].
        per_class: Largest number of images of a class; 0 for no limit.
        seed: Seed of the choice.
    """
    if fraction == 1 and not per_class:
        return images
    order = np.array([_draw(images, number, seed) for number in range(len(images))])
    chosen = []
    for label in np.unique(images.labels):
        places = np.flatnonzero(images.labels == label)
        count = max(1, round(fraction * len(places)))
        count = min(count, per_class) if per_class else count
        chosen.append(places[np.argsort(order[places], kind="stable")][:count])
    chosen_places = np.sort(np.concatenate(chosen))
    log.info("data.root: training uses %d of %d images", len(chosen_places), len(images))
    return LabelledImages(
        Part(images.images, chosen_places), images.labels[chosen_places], images.classes
    )


def _draw(images: LabelledImages, number: int, seed: int) -> int:
    """Returns a 64-bit hash of the seed and of an image, which decides whether it is chosen.

    For images in folders or local tar files the hash depends on the image's name, otherwise on its
    index `number`.
    """
    source, place = images.images, number
    if isinstance(source, Part):
        source, place = source.images, source.place(number)
    # The names of other sources may have to be fetched, block by block.
    has_names = isinstance(source, ImageFolder | TarShards)
    name = source.name(place) if has_names else str(place)
    digest = hashlib.blake2b(f"{seed} ".encode() + os.fsencode(name), digest_size=8).digest()
    return int.from_bytes(digest, "big")

"""A model's scores on bootstrap draws of the test images, in a file next to its scores.

mIoU and AP are not means over images. To show how much they depend on the choice of test images,
they are also computed on bootstrap draws: each draw takes N of the N test images at random, with
replacement. All models that are tested on the same images have the same draws, so that two models
are compared draw by draw (`paired.difference_of_redrawn`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fd_large.errors import FDError
from fd_large.files import read_json, write_json

REDRAWN = "redrawn.json"
# Enough for a standard deviation, but not for percentiles.
_DRAWS = 200


class Redrawn(NamedTuple):
    """A score on the test images and on bootstrap draws of them.

    Attributes:
        images: Fingerprint of the test images.
        score: Score on the original images.
        draws: (D,), the score on each of D draws; all models have the same draws.
    """

    images: str
    score: float
    draws: NDArray[np.float64]


def redraws(num_images: int) -> NDArray[np.int64]:
    """Returns how often each of D draws contains each of N images, (D, N) int64.

    N is `num_images`, D is `_DRAWS`. The result is the same at every call, since the seed is fixed.
    """
    shares = np.full(num_images, 1 / num_images)
    return np.random.default_rng(0).multinomial(num_images, shares, size=_DRAWS)


def write(
    folder: Path, images: str, redrawn: Mapping[str, tuple[float, NDArray[np.float64]]]
) -> Path:
    """Writes the scores of an evaluation and their values on draws; returns the file's path.

    A score that is not finite, or not finite on some draw, is left out.

    Args:
        folder: The folder of the evaluation, in which the file is made.
        images: Fingerprint of the test images.
        redrawn: {name of the score in the run's summary.json: (score, its values on the draws)},
            with the draws in the order of `redraws`.
    """
    scores = {
        name: {"score": score, "draws": draws.tolist()}
        for name, (score, draws) in redrawn.items()
        if np.isfinite(draws).all() and np.isfinite(score)
    }
    write_json(folder / REDRAWN, {"images": images, "scores": scores})
    return folder / REDRAWN


def read(folder: Path, name: str) -> Redrawn | None:
    """Returns a score of an evaluation with its draws.

    Returns None if the file does not exist, cannot be read, or lacks the score; earlier versions
    wrote no draws.

    Args:
        folder: The folder of the evaluation.
        name: The score's name in the run's summary.json.
    """
    try:
        record = read_json(folder / REDRAWN, where="redrawn", holds=dict)
        of_name = record["scores"][name]
        return Redrawn(record["images"], float(of_name["score"]), np.array(of_name["draws"], float))
    except (FDError, OSError, LookupError, TypeError, ValueError):
        return None
